//! PURE: which networks of the compute node the range of the pods' addresses hides from them.

use std::net::Ipv4Addr;

use crate::launch::network::protocol::Range;

/// How many networks are named.
const NAMED: usize = 8;

/// The networks that the node reaches by a route of their own, and that pods reach no more because they are in the range. `routes` is
/// the text of `/proc/net/route`. A network around the range is none of them: ranges are cut out of such.
pub(super) fn hidden(range: Range, routes: &str) -> Vec<Range> {
    let lines = routes.lines().skip(1);
    let mut hidden: Vec<Range> = lines
        .filter_map(route)
        .filter(|network| network.prefix >= range.prefix && range.contains(network.first))
        .collect();
    hidden.sort_unstable();
    hidden.dedup();
    hidden.truncate(NAMED);
    hidden
}

/// The destination of one line. Its numbers are in the byte order of the host.
fn route(line: &str) -> Option<Range> {
    let mut fields = line.split_ascii_whitespace();
    let address = number(fields.nth(1)?)?;
    let mask = number(fields.nth(5)?)?.to_bits();
    let prefix = u8::try_from(mask.leading_ones()).ok()?;
    Some(Range::new(address, prefix))
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
    fn networks_of_the_node_within_the_range_are_named() {
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
        let named = |range: &str| {
            let hidden = hidden(Range::parse(range).unwrap(), &text);
            let named: Vec<_> = hidden.iter().map(ToString::to_string).collect();
            named.join(" ")
        };
        assert_eq!(named("10.200.0.0/16"), "10.200.7.0/24");
        assert_eq!(named("10.200.7.0/24"), "10.200.7.0/24");
        assert_eq!(named("10.0.0.0/8"), "10.0.0.0/8 10.200.7.0/24");
        assert_eq!(named("10.201.0.0/16"), "");
        assert_eq!(named("192.168.0.0/16"), "");
        assert!(hidden(Range::parse("10.0.0.0/8").unwrap(), "").is_empty());
    }
}
