//! PURE: the addresses of an agent as a configuration writes them, one or a list.
//!
//! A text holds one address, or several separated by commas, as in an environment variable. A command may itself contain
//! commas, so an `exec:` address takes the rest of a text; as an element of a list it needs no such rule.
use std::fmt;

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{SeqAccess, Visitor},
};

use super::{Carrier, InvalidCarrier};

/// The most addresses of one agent.
const MOST: usize = 16;

/// Addresses that are not yet parsed, in the order in which they are tried.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Addresses(Vec<String>);

/// Why addresses cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidAddresses {
    /// One of them.
    #[error(transparent)]
    Carrier(#[from] InvalidCarrier),
    /// None at all.
    #[error("names no address")]
    None,
    /// One of them twice: its pauses would not count.
    #[error("names {address} twice")]
    Twice {
        /// Which.
        address: String,
    },
    /// More than anybody has login nodes.
    #[error("names more than {MOST} addresses")]
    TooMany,
}

impl Addresses {
    /// The carriers, in order.
    pub fn carriers(&self) -> Result<Vec<Carrier>, InvalidAddresses> {
        let parsed: Result<Vec<Carrier>, _> = self.0.iter().map(|text| text.parse()).collect();
        let carriers = parsed?;
        match carriers.len() {
            0 => return Err(InvalidAddresses::None),
            1..=MOST => {}
            _ => return Err(InvalidAddresses::TooMany),
        }
        for (index, carrier) in carriers.iter().enumerate() {
            if carriers[..index].contains(carrier) {
                let address = carrier.to_string();
                return Err(InvalidAddresses::Twice { address });
            }
        }
        Ok(carriers)
    }

    /// The address, if there is only one.
    #[must_use]
    pub fn only(&self) -> Option<&str> {
        match self.0.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    fn split(text: &str) -> Self {
        let mut found = Vec::new();
        let mut rest = text.trim();
        while !rest.is_empty() {
            let whole = rest.starts_with("exec:");
            let comma = rest.split_once(',').filter(|_| !whole);
            let (address, left) = comma.unwrap_or((rest, ""));
            found.push(address.trim().to_owned());
            rest = left.trim();
        }
        Self(found)
    }
}

impl From<&str> for Addresses {
    fn from(text: &str) -> Self {
        Self::split(text)
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(input: D) -> Result<Self, D::Error> {
        struct TextOrList;

        impl<'de> Visitor<'de> for TextOrList {
            type Value = Addresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address or a list of addresses")
            }

            fn visit_str<E>(self, text: &str) -> Result<Addresses, E> {
                Ok(Addresses::split(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Addresses, A::Error> {
                let mut found = Vec::new();
                while let Some(address) = list.next_element()? {
                    found.push(address);
                }
                Ok(Addresses(found))
            }
        }

        input.deserialize_any(TextOrList)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(text: &str) -> Vec<String> {
        let carriers = Addresses::from(text).carriers().unwrap();
        carriers.iter().map(Carrier::to_string).collect()
    }

    #[test]
    fn one_address_or_several_with_commas() {
        assert_eq!(shown("login:10350"), ["tcp:login:10350"]);
        assert_eq!(shown("a:1, b:2"), ["tcp:a:1", "tcp:b:2"]);
        assert_eq!(
            shown("ssh:u@a,exec:[\"ssh\",\"-o\",\"A=b,c\"]"),
            ["ssh:u@a", "exec:[\"ssh\",\"-o\",\"A=b,c\"]"]
        );
        assert_eq!(
            shown("exec:ssh -o A=b,c login"),
            ["exec:ssh -o A=b,c login"]
        );
    }

    #[test]
    fn wrong_ones_are_named() {
        for (text, said) in [
            ("", "no address"),
            ("a:1,,b:2", "HOST:PORT"),
            ("a:1,a:1", "twice"),
            ("ssh:-o", "[USER@]HOST"),
        ] {
            let error = Addresses::from(text).carriers().unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
        let many: Vec<String> = (1..=17).map(|port| format!("a:{port}")).collect();
        let error = Addresses(many).carriers().unwrap_err();
        assert_eq!(error, InvalidAddresses::TooMany);
    }
}
