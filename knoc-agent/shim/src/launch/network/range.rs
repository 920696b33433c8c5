//! PURE: a range of IPv4 addresses.

use std::{fmt, net::Ipv4Addr};

use knoc_proto::egress;
use serde::{Deserialize, Serialize};

/// The addresses that begin with the first `prefix` bits of `first`, whose other bits are zero.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Range {
    pub(crate) first: Ipv4Addr,
    pub(crate) prefix: u8,
}

impl Range {
    pub(crate) const fn new(first: Ipv4Addr, prefix: u8) -> Self {
        Self { first, prefix }
    }

    /// The range of a text such as `10.96.0.0/12`, in which address bits beyond the prefix do not count. `None` if it is
    /// none of IPv4.
    pub(crate) fn parse(text: &str) -> Option<Self> {
        let (first, prefix) = text.parse::<egress::Range>().ok()?.ipv4()?;
        let given = Self::new(first, prefix);
        let first = Ipv4Addr::from_bits(first.to_bits() & given.mask());
        Some(Self::new(first, prefix))
    }

    fn mask(self) -> u32 {
        // A shift by all bits is none.
        u32::MAX
            .checked_shl(32 - u32::from(self.prefix.min(32)))
            .unwrap_or(0)
    }

    pub(crate) fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & self.mask() == self.first.to_bits()
    }

    /// Whether an address is in both.
    pub(crate) fn overlaps(self, other: Self) -> bool {
        self.contains(other.first) || other.contains(self.first)
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.first, self.prefix)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_what_its_prefix_says() {
        let range = Range::parse("10.96.0.0/12").unwrap();
        assert_eq!(range.to_string(), "10.96.0.0/12");
        assert_eq!(Range::parse("10.100.0.1/12"), Some(range));
        assert!(range.contains(Ipv4Addr::new(10, 111, 255, 255)));
        assert!(!range.contains(Ipv4Addr::new(10, 112, 0, 0)));
        let all = Range::new(Ipv4Addr::UNSPECIFIED, 0);
        assert!(all.contains(Ipv4Addr::BROADCAST) && all.overlaps(range) && range.overlaps(all));
        let one = Range::parse("10.96.0.1/32").unwrap();
        assert!(one.overlaps(range) && range.overlaps(one));
        assert!(!one.overlaps(Range::parse("10.96.0.2/32").unwrap()));
        assert_eq!(Range::parse("10.96.0.0"), None);
        assert_eq!(Range::parse("fd00::/8"), None);
    }
}
