//! Shared by the fuzz targets and the tests: any bytes as a claim file and as a report file, and
//! what must hold for them. A violation panics.
//!
//! Compiled for tests, and with the feature `fuzzed` for the targets in `knoc-agent/fuzz`.

#![allow(
    unreachable_pub,
    clippy::panic,
    clippy::expect_used,
    reason = "public for the fuzz targets; a harness says what it found by a panic"
)]

use prost::Message as _;

use super::decode::{DecodeError, MAX_CLAIM, MAX_REPORT, MAX_REPORT_FIELDS, claim, report};

/// Decodes any bytes as `claim.<n>`.
///
/// # Panics
/// If the decoded claim would be written differently, or is not fit for a log line.
pub fn claim_file(data: &[u8]) {
    match claim(data) {
        Ok(read) => {
            assert!(data.len() <= MAX_CLAIM);
            for text in [&read.job_id, &read.host] {
                assert!(!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic()));
            }
            let written = serde_json::to_vec(&read).expect("a claim is JSON");
            let again = claim(&written).expect("what we write we read");
            assert_eq!(again, read);
        }
        Err(error) => one_line(&error, data),
    }
}

/// Decodes any bytes as `report.pb`.
///
/// # Panics
/// If the report exceeds the bounds, or would be written differently.
pub fn report_file(data: &[u8]) {
    match report(data) {
        Ok(read) => {
            assert!(data.len() <= MAX_REPORT);
            let parts = read.init_containers.len()
                + read.containers.len()
                + read.notes.len()
                + read.capabilities.len();
            assert!(parts <= MAX_REPORT_FIELDS, "{parts} parts");
            let again = report(&read.encode_to_vec()).expect("what we write we read");
            assert_eq!(again.encode_to_vec(), read.encode_to_vec());
        }
        Err(error) => one_line(&error, data),
    }
}

/// Errors are written to a log and to a pod's message.
fn one_line(error: &DecodeError, data: &[u8]) {
    let text = knoc_proto::error::chain(error);
    assert!(!text.chars().any(char::is_control), "{text:?}");
    assert!(text.len() <= 1024 + 4 * data.len().min(MAX_CLAIM), "{text}");
}

#[cfg(test)]
mod tests {
    use knoc_proto::pb;
    use proptest::prelude::*;

    use super::*;

    type Harness = fn(&[u8]);

    const HARNESSES: [(&str, Harness); 2] =
        [("claim_file", claim_file), ("report_file", report_file)];

    #[test]
    fn the_corpus_passes() {
        let corpus = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus");
        for (name, harness) in HARNESSES {
            let mut inputs = 0;
            for entry in std::fs::read_dir(corpus.join(name)).unwrap() {
                harness(&std::fs::read(entry.unwrap().path()).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "no corpus of {name}");
        }
    }

    #[test]
    fn small_bytes_that_would_be_large_in_memory_are_rejected() {
        // An empty container status, and a note: two bytes each.
        for field in [0x42, 0x8a] {
            let part: &[u8] = if field == 0x42 {
                &[0x42, 0]
            } else {
                &[0x8a, 1, 0]
            };
            let bytes = part.repeat(MAX_REPORT_FIELDS + 1);
            let error = report(&bytes).unwrap_err();
            assert!(matches!(error, DecodeError::TooMany { .. }), "{error}");
        }
        let error = report(&vec![0x42; MAX_REPORT + 1]).unwrap_err();
        assert!(matches!(error, DecodeError::TooLong { .. }), "{error}");
        let error = claim(&vec![b' '; MAX_CLAIM + 1]).unwrap_err();
        assert!(matches!(error, DecodeError::TooLong { .. }), "{error}");
    }

    #[test]
    fn a_claim_that_would_garble_a_log_is_rejected_with_its_field() {
        let text = |job: &str, host: &str| {
            let (job_id, host) = (job.to_owned(), host.to_owned());
            serde_json::to_vec(&super::super::decode::Claim {
                job_id,
                restart: 0,
                host,
            })
            .unwrap()
        };
        assert!(claim(&text("7_3", "c1.example.org")).is_ok());
        for (job, host, field) in [
            ("", "c1", "job_id"),
            ("7\n", "c1", "job_id"),
            ("7", "\x1b[2J", "host"),
        ] {
            let error = claim(&text(job, host)).unwrap_err();
            assert!(error.to_string().contains(field), "{error}");
        }
    }

    /// Bytes that pass the first checks more often than random bytes do.
    fn likely() -> impl Strategy<Value = Vec<u8>> {
        let note = |(message, at): (String, i64)| pb::PodNote {
            message,
            at,
            ..Default::default()
        };
        let notes = prop::collection::vec((".{0,20}", any::<i64>()).prop_map(note), 0..4);
        let report = (notes, any::<i64>(), ".{0,20}").prop_map(|(notes, sequence, reason)| {
            pb::Report {
                notes,
                sequence,
                reason,
                containers: vec![pb::ContainerStatus::default()],
                ..Default::default()
            }
            .encode_to_vec()
        });
        let claim = "\\{\"job_id\":\"[0-9\\\\\\\\n]{0,4}\",\"restart\":[0-9-]{1,11},\"host\":\"[a-z\\x00-\\x20é]{0,9}\"\\}?";
        prop_oneof![report, claim.prop_map(String::into_bytes)]
    }

    proptest! {
        #[test]
        fn any_bytes_keep_the_promises(
            data in likely(),
            place in any::<prop::sample::Index>(),
            byte in any::<u8>(),
            any in prop::collection::vec(any::<u8>(), 0..400),
        ) {
            let mut changed = data.clone();
            if let Some(at) = (!changed.is_empty()).then(|| place.index(changed.len())) {
                changed[at] = byte;
            }
            for (_, harness) in HARNESSES {
                harness(&data);
                harness(&changed);
                harness(&any);
            }
        }
    }
}
