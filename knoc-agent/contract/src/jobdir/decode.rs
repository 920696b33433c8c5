//! PURE: what the claim and report files of a job directory say, within bounds.
//!
//! They are read by another process than the one that wrote them, often on another host, and on a file system that
//! others may fill: whatever the bytes are, reading them takes little memory and no panic, and an error of one line.

use knoc_proto::pb;
use prost::{
    Message as _,
    bytes::Buf as _,
    encoding::{DecodeContext, decode_key, skip_field},
};
use serde::{Deserialize, Serialize};

/// A claim is some 100 bytes.
pub const MAX_CLAIM: usize = 4 << 10;

/// A report holds two messages of 4 KiB of each container, and a few notes.
pub const MAX_REPORT: usize = 4 << 20;

/// Top-level fields of a report: an empty one has two bytes in the file and some hundred in memory.
pub const MAX_REPORT_FIELDS: usize = 8 << 10;

/// As long as a host name may be; job ids are much shorter.
const MAX_WORD: usize = 253;

/// Who may run the containers of a job directory. The content of `claim.<n>`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The scheduler's job id.
    pub job_id: String,
    /// The scheduler's restart count of that job (`SLURM_RESTART_COUNT`).
    pub restart: u32,
    /// Where the claimant ran: for people.
    pub host: String,
}

/// Bytes that are not what was expected.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    /// More than any file of this kind has.
    #[error("it has more than {most} bytes")]
    TooLong {
        /// The bound.
        most: usize,
    },
    /// As [`Self::TooLong`].
    #[error("it has more than {most} fields")]
    TooMany {
        /// The bound.
        most: usize,
    },
    /// No JSON, or other JSON.
    #[error("its JSON is not that of a claim")]
    Json(#[from] serde_json::Error),
    /// A value that cannot be meant.
    #[error("its {field} is not a word of 1 to {MAX_WORD} printable ASCII characters")]
    Word {
        /// The field.
        field: &'static str,
    },
    /// No protocol buffer of this kind.
    #[error("its protocol buffer is not that of a report")]
    Protobuf(#[from] prost::DecodeError),
}

/// The content of `claim.<n>`.
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

/// The content of `report.pb`.
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
