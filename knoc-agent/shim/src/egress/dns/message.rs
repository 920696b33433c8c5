//! PURE: what the shim reads of DNS messages (RFC 1035): the question, whether a message answers it, and how long the answer
//! may be kept.
//!
//! Whatever cannot be read is passed on as it is, and never kept.

use std::time::Duration;

#[cfg(any(test, feature = "fuzzed"))]
pub(crate) mod fuzzed;

/// The length of the header.
pub(super) const HEADER: usize = 12;

/// The longest question that is looked at, and the longest answer that is kept.
const QUESTION: usize = 512;
const ANSWER: usize = 4096;

/// The longest message that is passed on: what servers take by datagram (RFC 6891). Longer ones would fill the memory while they wait.
const LONGEST: usize = 4096;

/// The longest name in a message, with its last byte.
const NAME: usize = 255;

/// How long an answer is kept at most: addresses of Services change while pods run.
const KEPT: u32 = 30;

/// The same for the answer that there is no such name, for which programs often wait to appear.
const KEPT_IF_MISSING: u32 = 5;

/// Types of records.
const SOA: u16 = 6;
const OPT: u16 = 41;

/// What follows the name of a record: type, class, lifetime and length.
const FIXED: usize = 10;

/// The last number in the data of an SOA record: how long a missing name may be kept.
const MINIMUM: usize = 4;

/// A question as a container has asked it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Question {
    /// The whole message apart from its id, with the name in lower case: its answer may depend on every flag.
    pub(super) key: Vec<u8>,
    /// The name in lower case, as in the message: each label after its length, and a zero.
    pub(super) name: Vec<u8>,
    /// The type and the class.
    kind: [u8; 4],
    /// Whether other questions may get the same answer.
    pub(super) is_plain: bool,
}

impl Question {
    /// Reads a message that asks one question. `None` if it is anything else.
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        let header = message.get(..HEADER)?;
        let [_, _, flags, _, counts @ ..] = header else {
            return None;
        };
        // It is a question (QR 0), of the usual kind (OPCODE 0).
        if flags & 0b1111_1000 != 0 || message.len() > QUESTION {
            return None;
        }
        let [0, 1, 0, 0, 0, 0, 0, extra] = counts else {
            return None;
        };
        let (name, end) = plain_name(message, HEADER)?;
        let kind = message.get(end..)?.first_chunk().copied()?;
        let rest = message.get(end + 4..)?;
        let is_plain = match extra {
            0 => rest.is_empty(),
            1 => is_plain_opt(rest),
            _ => false,
        };
        let mut key = message.get(2..)?.to_vec();
        if let Some(own) = key.get_mut(HEADER - 2..end - 2) {
            own.copy_from_slice(&name);
        }
        Some(Self {
            key,
            name,
            kind,
            is_plain,
        })
    }

    /// Whether a message answers this question, whatever its id is.
    pub(super) fn is_answered_by(&self, message: &[u8]) -> bool {
        if !is_answer(message) {
            return false;
        }
        match message.get(4..6) {
            Some([0, 1]) => plain_name(message, HEADER).is_some_and(|(name, end)| {
                name == self.name && message.get(end..end + 4) == Some(self.kind.as_slice())
            }),
            // A server that did not understand the question may leave it out.
            Some([0, 0]) => code(message) != Some(0),
            Some(_) | None => false,
        }
    }
}

/// An answer that may be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Kept {
    pub(super) message: Vec<u8>,
    pub(super) lifetime: Duration,
    /// Where the lifetimes of its records are.
    lifetimes: Vec<usize>,
}

impl Kept {
    /// Reads an answer. `None` if it must not be kept: it is cut off, a failure, without a lifetime, or malformed.
    pub(super) fn parse(message: &[u8]) -> Option<Self> {
        if message.len() > ANSWER || !is_answer(message) || message.get(4..6) != Some(&[0, 1]) {
            return None;
        }
        let is_cut_off = message.get(2)? & 0b10 != 0;
        let is_missing = match code(message)? {
            0 => false,
            3 => true,
            _ => return None,
        };
        let (_, question) = plain_name(message, HEADER)?;
        let records = Records::parse(message, question + 4)?;
        if is_cut_off {
            return None;
        }
        let answers = number(message, 6)?;
        let least = records.least?;
        let least = match records.missing {
            // Nothing, or an alias of nothing.
            Some(missing) => least.min(missing).min(KEPT_IF_MISSING),
            None if is_missing || answers == 0 => return None,
            None => least.min(KEPT),
        };
        (least > 0).then(|| Self {
            message: message.to_vec(),
            lifetime: Duration::from_secs(least.into()),
            lifetimes: records.lifetimes,
        })
    }

    /// The answer to a message with the same question, after the answer was kept for this time.
    pub(super) fn answer(&self, question: &[u8], age: Duration) -> Option<Vec<u8>> {
        let mut answer = self.message.clone();
        answer.get_mut(..2)?.copy_from_slice(question.get(..2)?);
        // Some programs recognize an answer by the upper and lower case of their question.
        let (_, end) = plain_name(question, HEADER)?;
        let name = question.get(HEADER..end)?;
        answer.get_mut(HEADER..end)?.copy_from_slice(name);
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        for at in &self.lifetimes {
            let field = answer.get_mut(*at..)?.first_chunk_mut()?;
            *field = u32::from_be_bytes(*field).saturating_sub(age).to_be_bytes();
        }
        Some(answer)
    }

    /// How many bytes it takes up.
    pub(super) fn size(&self) -> usize {
        self.message.len() + self.lifetimes.len() * size_of::<usize>()
    }
}

/// The records after the question.
#[derive(Debug, Default)]
struct Records {
    /// Where their lifetimes are.
    lifetimes: Vec<usize>,
    /// The shortest lifetime.
    least: Option<u32>,
    /// How long the answer that something is missing may be kept.
    missing: Option<u32>,
}

impl Records {
    fn parse(message: &[u8], mut at: usize) -> Option<Self> {
        let answers = number(message, 6)?;
        let authorities = number(message, 8)?;
        let extra = number(message, 10)?;
        let all = u32::from(answers) + u32::from(authorities) + u32::from(extra);
        let mut records = Self::default();
        for index in 0..all {
            // Each record has at least eleven bytes, so this ends with the message.
            let fixed = skip_name(message, at)?;
            let kind = number(message, fixed)?;
            let length = usize::from(number(message, fixed + 8)?);
            let data = message.get(fixed + FIXED..fixed + FIXED + length)?;
            at = fixed + FIXED + length;
            if kind == OPT {
                // It has flags in place of a lifetime.
                continue;
            }
            let lifetime = seconds(message.get(fixed + 4..)?)?;
            records.lifetimes.push(fixed + 4);
            records.least = Some(records.least.map_or(lifetime, |least| least.min(lifetime)));
            let is_authority =
                index >= u32::from(answers) && index < u32::from(answers) + u32::from(authorities);
            if kind == SOA && is_authority {
                let start = data.len().checked_sub(MINIMUM)?;
                records.missing = Some(seconds(data.get(start..)?)?);
            }
        }
        Some(records)
    }
}

/// Whether a message is an answer (QR 1).
pub(super) fn is_answer(message: &[u8]) -> bool {
    message.len() >= HEADER && message.get(2).is_some_and(|flags| flags & 0x80 != 0)
}

/// Whether a message may be a question that a server takes.
pub(super) fn is_question(message: &[u8]) -> bool {
    (HEADER..=LONGEST).contains(&message.len()) && !is_answer(message)
}

/// The id of a message.
pub(in crate::egress) fn id(message: &[u8]) -> Option<u16> {
    number(message, 0)
}

/// The same message with another id.
pub(in crate::egress) fn with_id(message: &[u8], id: u16) -> Vec<u8> {
    let mut message = message.to_vec();
    if let Some(old) = message.first_chunk_mut() {
        *old = id.to_be_bytes();
    }
    message
}

/// The answer that the server has failed (SERVFAIL), to any message with a header.
pub(super) fn failure(question: &[u8]) -> Option<Vec<u8>> {
    let [high, low, flags, ..] = question.get(..HEADER)? else {
        return None;
    };
    // It is an answer, recursion is available, and the code is 2. The operation and the wish for recursion are repeated.
    let mut answer = vec![*high, *low, (flags & 0b0111_1001) | 0x80, 0x82];
    let repeated = plain_name(question, HEADER)
        .and_then(|(_, end)| question.get(HEADER..end + 4))
        .unwrap_or_default();
    answer.extend([0, u8::from(!repeated.is_empty()), 0, 0, 0, 0, 0, 0]);
    answer.extend(repeated);
    Some(answer)
}

fn code(message: &[u8]) -> Option<u8> {
    message.get(3).map(|flags| flags & 0xf)
}

fn number(message: &[u8], at: usize) -> Option<u16> {
    let bytes = message.get(at..)?.first_chunk()?;
    Some(u16::from_be_bytes(*bytes))
}

/// A lifetime. One with the first bit set counts as zero (RFC 2181).
fn seconds(bytes: &[u8]) -> Option<u32> {
    let seconds = u32::from_be_bytes(*bytes.first_chunk()?);
    Some(i32::try_from(seconds).map_or(0, |_| seconds))
}

/// The name at this place in lower case, and where it ends. `None` if it refers to another place, as names of questions do not.
fn plain_name(message: &[u8], start: usize) -> Option<(Vec<u8>, usize)> {
    let mut at = start;
    loop {
        let length = usize::from(*message.get(at)?);
        // The two highest bits are set in a reference.
        if length > 63 {
            return None;
        }
        at += 1 + length;
        if at - start > NAME {
            return None;
        }
        if length == 0 {
            return Some((message.get(start..at)?.to_ascii_lowercase(), at));
        }
    }
}

/// Where the name at this place ends. What it refers to is not read.
fn skip_name(message: &[u8], start: usize) -> Option<usize> {
    let mut at = start;
    loop {
        match message.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(*length),
            0xc0.. => return Some(at + 2),
            64..=0xbf => return None,
        }
        if at - start > NAME {
            return None;
        }
    }
}

/// Whether this is an OPT record without options, which says only how long an answer may be and whether signatures are wanted.
fn is_plain_opt(record: &[u8]) -> bool {
    matches!(record, [0, 0, 41, _, _, _, _, _, _, 0, 0])
}

#[cfg(test)]
pub(in crate::egress) mod samples {
    //! Messages for tests.

    /// A name as in a message.
    pub(crate) fn name(text: &str) -> Vec<u8> {
        let mut name = Vec::new();
        for label in text.split('.').filter(|label| !label.is_empty()) {
            name.push(u8::try_from(label.len()).unwrap());
            name.extend(label.as_bytes());
        }
        name.push(0);
        name
    }

    /// A question for the IPv4 address of this name.
    pub(crate) fn question(id: u16, text: &str) -> Vec<u8> {
        let mut message = id.to_be_bytes().to_vec();
        message.extend([1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        message.extend(name(text));
        message.extend([0, 1, 0, 1]);
        message
    }

    /// A record of this type for the name of the question.
    fn record(kind: u8, lifetime: u32, data: &[u8]) -> Vec<u8> {
        let mut record = vec![0xc0, 12, 0, kind, 0, 1];
        record.extend(lifetime.to_be_bytes());
        record.extend(u16::try_from(data.len()).unwrap().to_be_bytes());
        record.extend(data);
        record
    }

    fn answered(question: &[u8], code: u8, counts: [u8; 2], record: &[u8]) -> Vec<u8> {
        let mut message = question.to_vec();
        message[2] = 0x81;
        message[3] = 0x80 | code;
        message[7] = counts[0];
        message[9] = counts[1];
        message.extend(record);
        message
    }

    /// The answer with this address.
    pub(crate) fn found(question: &[u8], lifetime: u32, address: [u8; 4]) -> Vec<u8> {
        answered(question, 0, [1, 0], &record(1, lifetime, &address))
    }

    /// The answer that there is no such name (code 3) or no such record (code 0).
    pub(crate) fn missing(question: &[u8], code: u8, lifetime: u32, minimum: u32) -> Vec<u8> {
        let mut data = vec![0, 0];
        data.extend([0; 16]);
        data.extend(minimum.to_be_bytes());
        answered(question, code, [0, 1], &record(6, lifetime, &data))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{samples::*, *};

    const ADDRESS: [u8; 4] = [10, 96, 0, 1];

    fn parsed(message: &[u8]) -> Question {
        Question::parse(message).unwrap()
    }

    #[test]
    fn a_question_is_known_whatever_its_id_and_its_letters_are() {
        let one = question(1, "Web.NS.svc.cluster.local");
        let other = question(2, "web.ns.svc.cluster.local");
        assert_eq!(parsed(&one), parsed(&other));
        assert_eq!(parsed(&one).name, name("web.ns.svc.cluster.local"));
        assert!(parsed(&one).is_plain);
        assert_ne!(parsed(&one), parsed(&question(1, "web")));
        // Other flags, such as that no recursion is wanted, are another question.
        let mut flags = one.clone();
        flags[2] = 0;
        assert_ne!(parsed(&one).key, parsed(&flags).key);
    }

    #[test]
    fn extensions_are_part_of_the_question_and_options_make_it_one_of_its_own() {
        let with_opt = |data: &[u8]| {
            let mut message = question(1, "a");
            message[11] = 1;
            message.extend([0, 0, 41, 0x10, 0, 0, 0, 0, 0, 0]);
            message.push(u8::try_from(data.len()).unwrap());
            message.extend(data);
            message
        };
        let plain = parsed(&with_opt(&[]));
        assert!(plain.is_plain);
        assert_ne!(plain.key, parsed(&question(1, "a")).key);
        let cookie = parsed(&with_opt(&[0, 10, 0, 1, 7]));
        assert!(!cookie.is_plain);
        let mut trailing = question(1, "a");
        trailing.push(0);
        assert!(!parsed(&trailing).is_plain);
    }

    #[test]
    fn what_is_no_question_is_none() {
        let good = question(1, "a.b");
        let changed = |at: usize, byte: u8| {
            let mut message = good.clone();
            message[at] = byte;
            message
        };
        let mut long = good.clone();
        long.resize(600, 0);
        let wrong = [
            Vec::new(),
            good[..11].to_vec(),
            good[..good.len() - 1].to_vec(),
            // An answer, an update, two questions, a record, and a name that refers to another place.
            changed(2, 0x80),
            changed(2, 0x28),
            changed(5, 2),
            changed(7, 1),
            changed(12, 0xc0),
            long,
        ];
        for message in wrong {
            assert_eq!(Question::parse(&message), None, "{message:?}");
        }
        assert!(is_question(&changed(2, 0x28)) && !is_question(&changed(2, 0x80)));
        assert!(!is_question(&[0; 11]) && is_question(&[0; LONGEST]));
        assert!(!is_question(&[0; LONGEST + 1]));
    }

    #[test]
    fn only_a_message_with_the_same_question_answers_it() {
        let asked = question(1, "a.b");
        let of = parsed(&asked);
        assert!(of.is_answered_by(&found(&question(9, "A.b"), 5, ADDRESS)));
        assert!(!of.is_answered_by(&found(&question(1, "a.c"), 5, ADDRESS)));
        assert!(!of.is_answered_by(&asked), "it is a question");
        let mut other_type = found(&asked, 5, ADDRESS);
        let at = HEADER + name("a.b").len() + 1;
        other_type[at] = 28;
        assert!(!of.is_answered_by(&other_type));
        // The question was not understood.
        assert!(of.is_answered_by(&[0, 1, 0x80, 1, 0, 0, 0, 0, 0, 0, 0, 0]));
        assert!(!of.is_answered_by(&[0, 1, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0]));
    }

    #[test]
    fn an_answer_is_kept_for_its_shortest_lifetime_within_bounds() {
        let asked = question(1, "a.b");
        let kept = |message: &[u8]| Kept::parse(message).map(|kept| kept.lifetime.as_secs());
        assert_eq!(kept(&found(&asked, 7, ADDRESS)), Some(7));
        assert_eq!(kept(&found(&asked, 3600, ADDRESS)), Some(30));
        assert_eq!(kept(&found(&asked, 0, ADDRESS)), None);
        assert_eq!(kept(&found(&asked, 0x8000_0001, ADDRESS)), None);
        for code in [0, 3] {
            assert_eq!(kept(&missing(&asked, code, 3600, 3600)), Some(5));
            assert_eq!(kept(&missing(&asked, code, 3600, 2)), Some(2));
            assert_eq!(kept(&missing(&asked, code, 1, 3600)), Some(1));
        }
        // Without an SOA record nothing says for how long a name is missing.
        let mut bare = missing(&asked, 3, 10, 10);
        bare.truncate(asked.len());
        bare[9] = 0;
        assert_eq!(kept(&bare), None);
        let changed = |at: usize, byte: u8| {
            let mut message = found(&asked, 7, ADDRESS);
            message[at] = byte;
            message
        };
        // Cut off, a failure, refused, and more records than there are.
        for wrong in [
            changed(2, 0x83),
            changed(3, 0x82),
            changed(3, 0x85),
            changed(7, 2),
        ] {
            assert_eq!(kept(&wrong), None);
        }
    }

    #[test]
    fn a_kept_answer_has_the_id_the_letters_and_the_age_of_its_question() {
        let kept = Kept::parse(&found(&question(1, "a.b"), 20, ADDRESS)).unwrap();
        let answer = kept
            .answer(&question(0xbeef, "A.b"), Duration::from_secs(6))
            .unwrap();
        assert_eq!(answer, found(&question(0xbeef, "A.b"), 14, ADDRESS));
        let old = kept.answer(&question(1, "a.b"), Duration::from_secs(1000));
        assert_eq!(old.unwrap(), found(&question(1, "a.b"), 0, ADDRESS));
    }

    #[test]
    fn a_failure_repeats_the_question() {
        let asked = question(0xbeef, "a.b");
        let answer = failure(&asked).unwrap();
        assert!(parsed(&asked).is_answered_by(&answer));
        assert_eq!((id(&answer), code(&answer)), (Some(0xbeef), Some(2)));
        assert_eq!(failure(&asked[..11]), None);
        let cut = failure(&asked[..14]).unwrap();
        assert_eq!((cut.len(), cut.get(5)), (HEADER, Some(&0)));
        assert_eq!(with_id(&asked, 3), question(3, "a.b"));
    }

    proptest! {
        #[test]
        fn no_message_is_too_odd_to_be_read(
            message in proptest::collection::vec(any::<u8>(), 0..700),
            flags in any::<u8>(),
        ) {
            let mut message = message;
            if let Some(header) = message.get_mut(2..HEADER) {
                header.copy_from_slice(&[flags, 0, 0, 1, 0, 1, 0, 1, 0, 0]);
            }
            Question::parse(&message);
            if let Some(kept) = Kept::parse(&message) {
                prop_assert!(kept.lifetime <= Duration::from_secs(30));
                let answer = kept.answer(&message, Duration::from_secs(1));
                prop_assert_eq!(answer.unwrap().len(), message.len());
            }
            failure(&message);
        }
    }
}
