//! PURE: parses the ports and addresses of `port-forward`, which have the same forms as in kubectl.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// A pair of ports, `[LOCAL:]REMOTE`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ports {
    /// 0 stands for any free port.
    pub(super) local: u16,
    pub(super) remote: u16,
}

impl FromStr for Ports {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let number = |part: &str| {
            part.parse::<u16>()
                .map_err(|_| format!("{part:?} is not a port number (1 to 65535)"))
        };
        let (local, remote) = match text.split_once(':') {
            Some(("", remote)) => (0, number(remote)?),
            Some((local, remote)) => (number(local)?, number(remote)?),
            None => (number(text)?, number(text)?),
        };
        if remote == 0 {
            return Err("the remote port must be between 1 and 65535".to_owned());
        }
        Ok(Self { local, remote })
    }
}

/// The local addresses to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Addresses(Vec<Address>);

#[derive(Debug, Clone, PartialEq, Eq)]
enum Address {
    Localhost,
    Ip(IpAddr),
}

const LOCALHOST: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::LOCALHOST),
    IpAddr::V6(Ipv6Addr::LOCALHOST),
];

impl Addresses {
    /// The addresses in groups. If the flag is true, all addresses of the group must work; otherwise one is enough.
    pub(super) fn groups(&self) -> impl Iterator<Item = (&[IpAddr], bool)> {
        self.0.iter().map(|address| match address {
            Address::Localhost => (LOCALHOST.as_slice(), false),
            Address::Ip(ip) => (std::slice::from_ref(ip), true),
        })
    }
}

impl FromStr for Addresses {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let one = |part: &str| match part.trim() {
            "localhost" => Ok(Address::Localhost),
            part => part
                .parse()
                .map(Address::Ip)
                .map_err(|_| format!("{part:?} is neither localhost nor an IP address")),
        };
        text.split(',').map(one).collect::<Result<_, _>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_in_all_forms() {
        let parsed = |text: &str| {
            text.parse::<Ports>()
                .map(|ports| (ports.local, ports.remote))
        };
        assert_eq!(parsed("80"), Ok((80, 80)));
        assert_eq!(parsed("8080:80"), Ok((8080, 80)));
        assert_eq!(parsed(":80"), Ok((0, 80)));
        assert_eq!(parsed("0:80"), Ok((0, 80)));
        for wrong in [
            "",
            "0",
            "80:",
            "80:0",
            "http",
            "1:2:3",
            "65536",
            "-1",
            "8080:http",
        ] {
            assert!(parsed(wrong).is_err(), "{wrong}");
        }
        assert!(parsed("http").unwrap_err().contains("not a port number"));
    }

    #[test]
    fn addresses_are_names_of_this_machine() {
        let all: Addresses = "localhost, 10.0.0.1,::".parse().unwrap();
        let groups: Vec<_> = all.groups().map(|(ips, all)| (ips.len(), all)).collect();
        assert_eq!(groups, [(2, false), (1, true), (1, true)]);
        assert!(
            "example.org"
                .parse::<Addresses>()
                .unwrap_err()
                .contains("neither")
        );
        assert!("".parse::<Addresses>().is_err());
    }
}
