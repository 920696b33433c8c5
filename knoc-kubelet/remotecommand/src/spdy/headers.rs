//! PURE: SPDY/3.1 header blocks. Each direction of a connection is one zlib stream with a preset dictionary and a sync
//! flush after each block. Therefore every block that arrives must be inflated, in order, including those of refused
//! streams.
//!
//! A block that inflates to more than [`MAX_INFLATED`] bytes or has more than [`MAX_HEADERS`] headers ends the
//! connection, because the state of the compression is lost. It never panics (property tests below).

use bytes::{Buf as _, BufMut as _, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};
use thiserror::Error;

/// The preset dictionary of SPDY/3.
const DICTIONARY: &[u8] = include_bytes!("dictionary.bin");
/// The most bytes of one inflated block.
pub(crate) const MAX_INFLATED: usize = 1 << 20;
/// The most headers of one block.
const MAX_HEADERS: usize = 100;
/// How many bytes are inflated in one step.
const STEP: usize = 4 << 10;

/// Why a header block cannot be read, which ends the connection.
#[derive(Debug, Error)]
pub enum HeaderError {
    #[error("inflate a header block")]
    Inflate {
        #[source]
        source: flate2::DecompressError,
    },
    #[error("the header compression's dictionary is not SPDY/3's")]
    Dictionary,
    #[error("a header block of more than {MAX_INFLATED} bytes")]
    TooLarge,
    #[error("a header block with {count} headers, more than {MAX_HEADERS}")]
    TooMany { count: u32 },
    #[error("a header block that is truncated")]
    Cut,
    #[error("a header that is not text")]
    NotText,
    #[error("deflate a header block")]
    Deflate {
        #[source]
        source: flate2::CompressError,
    },
}

/// The headers of a stream: names in lower case; several values of one name are several pairs.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Headers(pub(crate) Vec<(String, String)>);

impl Headers {
    /// Creates headers from pairs whose names are in lower case.
    #[cfg(any(test, feature = "test-peer"))]
    pub fn of(pairs: impl Iterator<Item = (String, String)>) -> Self {
        Self(pairs.collect())
    }

    /// The first value of a name, which must be in lower case.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        let mut pairs = self.0.iter();
        pairs
            .find(|(key, _)| key == name)
            .map(|(_, value)| value.as_str())
    }
}

/// The receiving direction.
#[derive(Debug)]
pub(crate) struct Inflater(Decompress);

impl Inflater {
    pub(crate) fn new() -> Self {
        Self(Decompress::new(true))
    }

    /// Reads one header block.
    pub(crate) fn headers(&mut self, block: &[u8]) -> Result<Headers, HeaderError> {
        parse(&self.inflate(block)?)
    }

    fn inflate(&mut self, mut block: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let mut out = Vec::with_capacity(STEP);
        loop {
            if out.len() == out.capacity() {
                out.reserve(STEP);
            }
            let before = (self.0.total_in(), out.len());
            let stepped = self
                .0
                .decompress_vec(block, &mut out, FlushDecompress::Sync);
            let used = usize::try_from(self.0.total_in() - before.0).unwrap_or(usize::MAX);
            block = block.get(used..).unwrap_or_default();
            match stepped {
                Ok(Status::StreamEnd) => return Err(HeaderError::Cut),
                Ok(_) => {}
                Err(error) if error.needs_dictionary().is_some() => {
                    self.0
                        .set_dictionary(DICTIONARY)
                        .map_err(|_| HeaderError::Dictionary)?;
                    continue;
                }
                Err(source) => return Err(HeaderError::Inflate { source }),
            }
            if out.len() > MAX_INFLATED {
                return Err(HeaderError::TooLarge);
            }
            // The output buffer was not filled, so the block has no more data.
            if block.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
            if used == 0 && out.len() == before.1 && out.len() < out.capacity() {
                return Err(HeaderError::Cut);
            }
        }
    }
}

fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
    let count = block.try_get_u32().map_err(|_| HeaderError::Cut)?;
    if usize::try_from(count).map_or(true, |count| count > MAX_HEADERS) {
        return Err(HeaderError::TooMany { count });
    }
    let mut pairs = Vec::new();
    for _ in 0..count {
        let name = text(&mut block)?.to_ascii_lowercase();
        for value in text(&mut block)?.split('\0') {
            pairs.push((name.clone(), value.to_owned()));
        }
    }
    Ok(Headers(pairs))
}

fn text<'a>(block: &mut &'a [u8]) -> Result<&'a str, HeaderError> {
    let length = block.try_get_u32().map_err(|_| HeaderError::Cut)?;
    let length = usize::try_from(length).map_err(|_| HeaderError::Cut)?;
    let (bytes, rest) = block.split_at_checked(length).ok_or(HeaderError::Cut)?;
    *block = rest;
    std::str::from_utf8(bytes).map_err(|_| HeaderError::NotText)
}

/// The sending direction.
#[derive(Debug)]
pub(super) struct Deflater(Compress);

impl Deflater {
    pub(super) fn new() -> Result<Self, HeaderError> {
        let mut deflate = Compress::new(Compression::fast(), true);
        deflate
            .set_dictionary(DICTIONARY)
            .map_err(|source| HeaderError::Deflate { source })?;
        Ok(Self(deflate))
    }

    /// Writes one header block.
    pub(super) fn block(&mut self, headers: &Headers) -> Result<Vec<u8>, HeaderError> {
        let mut plain = BytesMut::new();
        let length = |bytes: usize| u32::try_from(bytes).unwrap_or(u32::MAX);
        plain.put_u32(length(headers.0.len()));
        for (name, value) in &headers.0 {
            for text in [name, value] {
                plain.put_u32(length(text.len()));
                plain.put_slice(text.as_bytes());
            }
        }
        let mut out = Vec::with_capacity(STEP);
        let mut rest = &plain[..];
        loop {
            if out.len() == out.capacity() {
                out.reserve(STEP);
            }
            let before = self.0.total_in();
            self.0
                .compress_vec(rest, &mut out, FlushCompress::Sync)
                .map_err(|source| HeaderError::Deflate { source })?;
            let used = usize::try_from(self.0.total_in() - before).unwrap_or(usize::MAX);
            rest = rest.get(used..).unwrap_or_default();
            if rest.is_empty() && out.len() < out.capacity() {
                return Ok(out);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn headers(pairs: &[(&str, &str)]) -> Headers {
        let own = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        Headers(pairs.iter().map(own).collect())
    }

    #[test]
    fn a_stream_of_blocks_begins_with_the_dictionary_of_spdy() {
        let mut deflater = Deflater::new().unwrap();
        let block = deflater
            .block(&headers(&[("streamtype", "stdout")]))
            .unwrap();
        assert_eq!(block[0], 0x78);
        assert_eq!(block[2..6], [0xe3, 0xc6, 0xa7, 0xc2]);
    }

    #[test]
    fn reads_blocks_one_after_the_other() {
        let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::new());
        for kind in ["error", "stdin", "stdout", "resize", "error"] {
            let sent = headers(&[("streamtype", kind), ("port", "80"), ("requestid", "0")]);
            let block = deflater.block(&sent).unwrap();
            assert_eq!(inflater.headers(&block).unwrap(), sent);
        }
        assert_eq!(
            headers(&[("port", "80")]).get("port"),
            Some("80"),
            "by name"
        );
    }

    #[test]
    fn rejects_a_decompression_bomb_within_its_bounds() {
        let mut deflate = Compress::new(Compression::best(), true);
        deflate.set_dictionary(DICTIONARY).unwrap();
        let zeros = vec![0; 4 << 20];
        let mut bomb = Vec::with_capacity(1 << 20);
        deflate
            .compress_vec(&zeros, &mut bomb, FlushCompress::Sync)
            .unwrap();
        assert!(bomb.len() < 100 << 10);
        let error = Inflater::new().headers(&bomb);
        assert!(matches!(error, Err(HeaderError::TooLarge)), "{error:?}");
    }

    #[test]
    fn rejects_too_many_and_truncated_headers() {
        let error = parse(&u32::MAX.to_be_bytes());
        assert!(matches!(error, Err(HeaderError::TooMany { .. })));
        assert!(matches!(parse(&[]), Err(HeaderError::Cut)));
        let beyond = [0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 1];
        assert!(matches!(parse(&beyond), Err(HeaderError::Cut)));
    }

    proptest! {
        #[test]
        fn never_panics(blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 0..5)) {
            let mut inflater = Inflater::new();
            for block in &blocks {
                drop(inflater.headers(block));
                drop(parse(block));
            }
        }

        #[test]
        fn round_trips(blocks in prop::collection::vec(
            prop::collection::vec(("[a-z-]{1,20}", "[^\\x00]{0,300}"), 0..20), 1..6,
        )) {
            let (mut deflater, mut inflater) = (Deflater::new().unwrap(), Inflater::new());
            for pairs in blocks {
                let sent = Headers(pairs);
                let block = deflater.block(&sent).unwrap();
                prop_assert_eq!(inflater.headers(&block).unwrap(), sent);
            }
        }
    }
}
