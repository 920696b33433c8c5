//! PURE: which networks of a host lie in a range of addresses that leads its pods elsewhere.

use std::net::Ipv4Addr;

/// How many networks are named.
const NAMED: usize = 8;

/// The networks that the host reaches by a route of their own, and that pods reach no more because they are in the range: its first
/// address, and how many bits of it count. `routes` is the text of `/proc/net/route`. A network around the range is none of them: ranges
/// are cut out of such.
#[must_use]
pub fn hidden((first, prefix): (Ipv4Addr, u8), routes: &str) -> Vec<String> {
    let lines = routes.lines().skip(1);
    let is_within = |network: &(Ipv4Addr, u32)| {
        let differs = network.0.to_bits() ^ first.to_bits();
        let prefix = u32::from(prefix);
        network.1 >= prefix && differs.leading_zeros() >= prefix
    };
    let mut hidden: Vec<(Ipv4Addr, u32)> = lines.filter_map(route).filter(is_within).collect();
    hidden.sort_unstable();
    hidden.dedup();
    hidden.truncate(NAMED);
    let text = |(address, prefix)| format!("{address}/{prefix}");
    hidden.into_iter().map(text).collect()
}

/// The destination of one line, and how many bits of it count. Its numbers are in the byte order of the host.
fn route(line: &str) -> Option<(Ipv4Addr, u32)> {
    let mut fields = line.split_ascii_whitespace();
    let address = number(fields.nth(1)?)?;
    let mask = number(fields.nth(5)?)?.to_bits();
    Some((address, mask.leading_ones()))
}

fn number(field: &str) -> Option<Ipv4Addr> {
    let number = u32::from_str_radix(field, 16).ok()?;
    Some(Ipv4Addr::from(number.to_ne_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A line for this network, as the kernel writes it.
    fn line(address: Ipv4Addr, mask: Ipv4Addr) -> String {
        let hexadecimal = |address: Ipv4Addr| {
            let number = u32::from_ne_bytes(address.octets());
            format!("{number:08X}")
        };
        format!(
            "eth0\t{}\t00000000\t0001\t0\t0\t0\t{}\t0\t0\t0\n",
            hexadecimal(address),
            hexadecimal(mask)
        )
    }

    #[test]
    fn networks_of_the_host_within_the_range_are_named() {
        let head =
            "Iface\tDestination\tGateway\tFlags\tRefCnt\tUse\tMetric\tMask\tMTU\tWindow\tIRTT\n";
        let default = line(Ipv4Addr::UNSPECIFIED, Ipv4Addr::UNSPECIFIED);
        let inside = line(
            Ipv4Addr::new(10, 200, 7, 0),
            Ipv4Addr::new(255, 255, 255, 0),
        );
        let around = line(Ipv4Addr::new(10, 0, 0, 0), Ipv4Addr::new(255, 0, 0, 0));
        let other = line(Ipv4Addr::new(172, 16, 0, 0), Ipv4Addr::new(255, 240, 0, 0));
        let text = format!("{head}{default}{inside}{around}{inside}{other}rubbish\n");
        let named = |first: [u8; 4], prefix| hidden((first.into(), prefix), &text).join(" ");
        assert_eq!(named([10, 200, 0, 0], 16), "10.200.7.0/24");
        assert_eq!(named([10, 200, 7, 0], 24), "10.200.7.0/24");
        assert_eq!(named([10, 0, 0, 0], 8), "10.0.0.0/8 10.200.7.0/24");
        assert_eq!(named([10, 201, 0, 0], 16), "");
        assert_eq!(named([192, 168, 0, 0], 16), "");
        // Bits beyond the prefix do not count.
        assert_eq!(named([10, 200, 9, 9], 16), "10.200.7.0/24");
        assert!(hidden((Ipv4Addr::new(10, 0, 0, 0), 8), "").is_empty());
    }
}
