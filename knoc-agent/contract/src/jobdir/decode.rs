//! PURE: decodes the claim and report files of a job directory, within bounds.
//!
//! The reader is another process than the writer, often on another host, and others may be able to
//! write to the file system. Whatever the bytes are, decoding uses little memory and does not
//! panic, and an error fits on one line.

use knoc_proto::pb;
use prost::{
    Message as _,
    bytes::Buf as _,
    encoding::{DecodeContext, decode_key, skip_field},
};
use serde::{Deserialize, Serialize};

/// The maximum size of a claim in bytes; a usual one has about 100.
pub const MAX_CLAIM: usize = 4 << 10;

/// The maximum size of a report in bytes. It holds two messages of 4 KiB for each container, and a
/// few notes.
pub const MAX_REPORT: usize = 4 << 20;

/// The maximum number of a report's top-level fields. An empty field has two bytes in the file and
/// some hundred in memory.
pub const MAX_REPORT_FIELDS: usize = 8 << 10;

/// The maximum length of a host name, in bytes; job IDs are much shorter.
const MAX_WORD: usize = 253;

/// The job that may run the containers of a job directory: the content of `claim.<n>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The scheduler's job id.
    pub job_id: String,
    /// The scheduler's restart count of that job (`SLURM_RESTART_COUNT`).
    pub restart: u32,
    /// The host on which the claimant ran, for messages.
    pub host: String,
}

/// Why bytes are not a claim or a report.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// The file is larger than any file of its kind.
    #[error("it has more than {most} bytes")]
    TooLong {
        /// The limit in bytes.
        most: usize,
    },
    /// The file has more fields than any file of its kind.
    #[error("it has more than {most} fields")]
    TooMany {
        /// The limit.
        most: usize,
    },
    /// The bytes are not JSON, or not the JSON of a claim.
    #[error("its JSON is not that of a claim")]
    Json(#[from] serde_json::Error),
    /// A value is not a plausible job ID or host name.
    #[error("its {field} is not a word of 1 to {MAX_WORD} printable ASCII characters")]
    Word {
        /// The field.
        field: &'static str,
    },
    /// The bytes are not a protocol buffer of this kind.
    #[error("its protocol buffer is not that of a report")]
    Protobuf(#[from] prost::DecodeError),
}

/// Decodes the content of `claim.<n>`.
pub fn claim(bytes: &[u8]) -> Result<Claim, DecodeError> {
    if bytes.len() > MAX_CLAIM {
        return Err(DecodeError::TooLong { most: MAX_CLAIM });
    }
    let claim: Claim = serde_json::from_slice(bytes)?;
    let words = [("job_id", &claim.job_id), ("host", &claim.host)];
    for (field, text) in words {
        if !is_word(text) {
            return Err(DecodeError::Word { field });
        }
    }
    Ok(claim)
}

fn is_word(text: &str) -> bool {
    (1..=MAX_WORD).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Decodes the content of `report.pb`.
pub fn report(bytes: &[u8]) -> Result<pb::Report, DecodeError> {
    if bytes.len() > MAX_REPORT {
        return Err(DecodeError::TooLong { most: MAX_REPORT });
    }
    let mut rest = bytes;
    let mut fields = 0;
    while rest.has_remaining() {
        let (tag, kind) = decode_key(&mut rest)?;
        skip_field(kind, tag, &mut rest, DecodeContext::default())?;
        fields += 1;
        if fields > MAX_REPORT_FIELDS {
            return Err(DecodeError::TooMany {
                most: MAX_REPORT_FIELDS,
            });
        }
    }
    Ok(pb::Report::decode(bytes)?)
}
