//! PURE: packets of IPv4, as far as the shim looks at them: from whom, for whom, and the answer to one that goes nowhere.

use std::net::Ipv4Addr;

/// The largest packet that the protocol allows, in bytes.
pub(super) const LARGEST: usize = 65_535;

/// The shortest header.
const HEADER: usize = 20;
/// The numbers of the protocols that programs use (IANA, "Protocol Numbers").
const ICMP: u8 = 1;
const TCP: u8 = 6;
const UDP: u8 = 17;
/// Types of ICMP messages (RFC 792).
const ECHO_REQUEST: u8 = 8;
const UNREACHABLE: u8 = 3;
/// How much of a packet its sender needs to recognize it: the header and eight bytes (RFC 792).
const QUOTED: usize = 8;
/// The time to live of a packet that is made here.
const HOPS: u8 = 64;

/// Why a packet does not reach its target, as its sender is told (RFC 792 and RFC 1812).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reason {
    /// Nobody has the address, or its node is not reached. `connect` fails with EHOSTUNREACH.
    HostUnreachable,
    /// The site does not let these pods reach each other. `connect` fails with EHOSTUNREACH.
    Prohibited,
}

impl Reason {
    fn code(self) -> u8 {
        match self {
            Self::HostUnreachable => 1,
            Self::Prohibited => 13,
        }
    }
}

/// From whom a packet is, and for whom.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) source: Ipv4Addr,
    pub(super) target: Ipv4Addr,
}

/// The header of a packet; `None` if it is not exactly one whole packet of IPv4.
pub(super) fn header(packet: &[u8]) -> Option<Header> {
    let first = *packet.first()?;
    let length = header_length(packet)?;
    let total = usize::from(word(packet, 2)?);
    if first >> 4 != 4 || length < HEADER || total < length || total != packet.len() {
        return None;
    }
    Some(Header {
        source: address(packet, 12)?,
        target: address(packet, 16)?,
    })
}

/// The packet that tells the sender of this one that it does not arrive, as if its target had sent it. `None` if nobody waits for
/// such an answer: to other protocols, to ICMP messages that are answers themselves, and to later parts of a packet.
pub(super) fn refusal(packet: &[u8], reason: Reason) -> Option<Vec<u8>> {
    let Header { source, target } = header(packet)?;
    let length = header_length(packet)?;
    let is_later_part = word(packet, 6)? & 0x1fff != 0;
    let answered = match *packet.get(9)? {
        TCP | UDP => true,
        ICMP => packet.get(length) == Some(&ECHO_REQUEST),
        _ => false,
    };
    if is_later_part || !answered {
        return None;
    }
    let quoted = packet.get(..packet.len().min(length + QUOTED))?;
    let mut message = vec![UNREACHABLE, reason.code(), 0, 0, 0, 0, 0, 0];
    message.extend(quoted);
    put_checksum(&mut message, 2);
    let total = u16::try_from(HEADER + message.len()).ok()?;
    // Version and length of the header, type of service, length, no identification, no parts.
    let mut whole = vec![0x45, 0];
    whole.extend(total.to_be_bytes());
    whole.extend([0, 0, 0, 0, HOPS, ICMP, 0, 0]);
    whole.extend(target.octets());
    whole.extend(source.octets());
    put_checksum(&mut whole, 10);
    whole.extend(message);
    Some(whole)
}

/// The length of the header, which its first byte has in units of four bytes.
fn header_length(packet: &[u8]) -> Option<usize> {
    packet.first().map(|first| usize::from(first & 0xf) * 4)
}

fn word(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..at + 2)?.try_into().ok()?;
    Some(u16::from_be_bytes(word))
}

fn address(packet: &[u8], at: usize) -> Option<Ipv4Addr> {
    let octets: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
    Some(octets.into())
}

/// Puts the checksum of `bytes` (RFC 1071) at this place in them, where zeros are.
fn put_checksum(bytes: &mut [u8], at: usize) {
    let sum = checksum(bytes).to_be_bytes();
    if let Some(place) = bytes.get_mut(at..at + 2) {
        place.copy_from_slice(&sum);
    }
}

fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2).map(|pair| match pair {
        [high, low] => u32::from(u16::from_be_bytes([*high, *low])),
        [high] => u32::from(*high) << 8,
        _ => 0,
    });
    let mut sum = words.fold(0_u32, u32::saturating_add);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FROM: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);
    const TO: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

    /// A packet of this protocol with this content.
    fn packet(protocol: u8, content: &[u8]) -> Vec<u8> {
        let total = u16::try_from(HEADER + content.len()).unwrap();
        let mut packet = vec![0x45, 0];
        packet.extend(total.to_be_bytes());
        packet.extend([0, 0, 0, 0, HOPS, protocol, 0, 0]);
        packet.extend(FROM.octets());
        packet.extend(TO.octets());
        packet.extend(content);
        packet
    }

    #[test]
    fn only_one_whole_packet_of_ipv4_has_a_header() {
        let good = packet(TCP, b"content");
        let expected = Header {
            source: FROM,
            target: TO,
        };
        assert_eq!(header(&good), Some(expected));
        let longer = [&good[..], b"x"].concat();
        let version = |first: u8| {
            let mut other = good.clone();
            other[0] = first;
            other
        };
        for wrong in [
            &[][..],
            &good[..19],
            &good[..good.len() - 1],
            &longer[..],
            // IPv6, and headers that are too short or longer than the packet.
            &version(0x65)[..],
            &version(0x44)[..],
            &version(0x4f)[..],
        ] {
            assert_eq!(header(wrong), None, "{wrong:?}");
        }
    }

    #[test]
    fn the_sender_of_a_packet_that_goes_nowhere_is_told() {
        let sent = packet(TCP, &[7; 40]);
        let answer = refusal(&sent, Reason::HostUnreachable).unwrap();
        let expected = Header {
            source: TO,
            target: FROM,
        };
        assert_eq!(header(&answer), Some(expected));
        let (head, message) = answer.split_at(HEADER);
        assert_eq!(head[9], ICMP);
        assert_eq!(&message[..2], [UNREACHABLE, 1]);
        // It quotes the header and eight bytes, and its checksums are right: the sum of all is zero.
        assert_eq!(&message[8..], &sent[..HEADER + QUOTED]);
        assert_eq!((checksum(head), checksum(message)), (0, 0));
        let prohibited = refusal(&sent, Reason::Prohibited).unwrap();
        assert_eq!(prohibited[HEADER + 1], 13);
        assert!(refusal(&packet(UDP, b""), Reason::Prohibited).is_some());
        assert!(refusal(&packet(ICMP, &[ECHO_REQUEST, 0]), Reason::Prohibited).is_some());
    }

    #[test]
    fn what_nobody_waits_for_is_not_answered() {
        let none = |packet: &[u8]| refusal(packet, Reason::HostUnreachable).is_none();
        // Another answer, an unknown protocol, and no packet at all.
        assert!(none(&packet(ICMP, &[UNREACHABLE, 1])));
        assert!(none(&packet(ICMP, b"")));
        assert!(none(&packet(41, &[0; 8])));
        assert!(none(b"x"));
        let mut later = packet(UDP, &[0; 8]);
        later[7] = 1;
        assert!(none(&later));
        // The first part of several is answered.
        later[6] = 0x20;
        later[7] = 0;
        assert!(!none(&later));
    }

    #[test]
    fn the_checksum_is_that_of_the_standard() {
        // The example of RFC 1071.
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(checksum(&bytes), !0xddf2);
        assert_eq!(checksum(&[1]), !0x0100);
    }

    proptest! {
        #[test]
        fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
            let refused = refusal(&bytes, Reason::Prohibited);
            prop_assert!(refused.is_none() || header(&bytes).is_some());
            if let Some(answer) = refused {
                prop_assert!(header(&answer).is_some());
            }
        }
    }
}
