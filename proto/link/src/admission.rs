//! PURE: which connections of unknown peers may stay open.
//!
//! A listener admits every connection that arrives and then decides which one to close, because refusing new ones would
//! favour whoever came first, and that is the attacker. If a source has too many connections, its oldest one is closed;
//! if all sources together have too many, the source with the most loses its oldest one. A flood from one address
//! therefore displaces only itself, and a client at the same address stays until as many newer connections as the bound
//! have arrived, which leaves enough time for a handshake.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use super::origin::Origin;

/// The unit by which connections are counted: an IPv4 address, or the /64 network of an IPv6 address, since a host is
/// usually assigned a whole /64. An IPv4-mapped IPv6 address (`::ffff:a.b.c.d`) counts as the IPv4 address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Source {
    /// One IPv4 address.
    V4(Ipv4Addr),
    /// The network of an IPv6 address.
    V6(Ipv6Addr),
    /// Our own host, through a unix socket.
    Local,
}

impl From<SocketAddr> for Source {
    fn from(address: SocketAddr) -> Self {
        match address.ip().to_canonical() {
            IpAddr::V4(address) => Self::V4(address),
            IpAddr::V6(address) => {
                let network = address.to_bits() & !u128::from(u64::MAX);
                Self::V6(Ipv6Addr::from_bits(network))
            }
        }
    }
}

impl From<Origin> for Source {
    fn from(origin: Origin) -> Self {
        match origin {
            Origin::Address(address) => address.into(),
            Origin::ThisHost | Origin::Command => Self::Local,
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::V4(address) => address.fmt(f),
            Self::V6(network) => write!(f, "{network}/64"),
            Self::Local => f.write_str("this host"),
        }
    }
}

/// How many connections a listener may have open, by the stage that they have reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Connections that have sent nothing. They cost little; the larger this bound, the longer each of them may stay.
    pub silent: usize,
    /// Connections that are in their TLS handshake.
    pub handshakes: usize,
    /// Connections whose peer has proved its identity.
    pub finished: usize,
}

impl Bounds {
    /// The bounds of one listener in a process that may open `files` descriptors. Most descriptors are left to the
    /// process's own work.
    #[must_use]
    pub fn of(files: u64) -> Self {
        let share = |part| usize::try_from(files / part).unwrap_or(usize::MAX);
        Self {
            silent: share(12).clamp(64, 4096),
            handshakes: share(32).clamp(64, 1024),
            // With a limit of 4096 files, 50 kubelets fit into their half with two connections each.
            finished: share(16).clamp(64, 1024),
        }
    }

    /// [`Bounds::of`] this process, with its current soft limit of open files (getrlimit(2)).
    #[must_use]
    pub fn own() -> Self {
        let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile);
        Self::of(limit.current.unwrap_or(u64::MAX))
    }

    /// The most descriptors that the connections of one listener use.
    #[must_use]
    pub fn descriptors(self) -> usize {
        self.silent + self.handshakes + self.finished
    }
}

/// The number of an admitted connection. A connection that arrived later has a larger ticket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Ticket(u64);

/// The connections that are admitted at present, by source.
#[derive(Debug)]
pub struct Admissions {
    overall: usize,
    per_source: usize,
    next: u64,
    sources: HashMap<Source, BTreeSet<Ticket>>,
    /// The sources, ordered by the number of their connections.
    ranks: BTreeMap<usize, BTreeSet<Source>>,
    tickets: HashMap<Ticket, Source>,
}

impl Admissions {
    /// No connections yet; at most `overall` of them, and at most `per_source` of one source.
    #[must_use]
    pub fn new(overall: usize, per_source: usize) -> Self {
        Self {
            overall: overall.max(1),
            per_source: per_source.max(1),
            next: 0,
            sources: HashMap::new(),
            ranks: BTreeMap::new(),
            tickets: HashMap::new(),
        }
    }

    /// The number of admitted connections.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tickets.len()
    }

    /// Whether no connection is admitted.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tickets.is_empty()
    }

    /// Admits a connection. Returns its ticket, and the connection that must be closed for it, which is never the new
    /// one.
    pub fn admit(&mut self, source: Source) -> (Ticket, Option<(Ticket, Source)>) {
        let ticket = Ticket(self.next);
        self.next += 1;
        self.tickets.insert(ticket, source);
        self.change(source, |own| own.insert(ticket));
        let own = self.sources.get(&source).map_or(0, BTreeSet::len);
        let evicted = if own > self.per_source {
            self.evict_from(source)
        } else if self.len() > self.overall {
            self.evict()
        } else {
            None
        };
        (ticket, evicted)
    }

    /// Removes and returns the oldest connection of the source that has the most. If several sources have the most, the
    /// one with the oldest connection is chosen.
    pub fn evict(&mut self) -> Option<(Ticket, Source)> {
        let (_, busiest) = self.ranks.last_key_value()?;
        let oldest = |source: &&Source| self.sources.get(source).and_then(BTreeSet::first).copied();
        let source = *busiest.iter().min_by_key(oldest)?;
        self.evict_from(source)
    }

    fn evict_from(&mut self, source: Source) -> Option<(Ticket, Source)> {
        let oldest = *self.sources.get(&source)?.first()?;
        self.remove(oldest);
        Some((oldest, source))
    }

    /// Removes a connection that has ended or has left this stage. Returns `None` if it was evicted before.
    pub fn remove(&mut self, ticket: Ticket) -> Option<Source> {
        let source = self.tickets.remove(&ticket)?;
        self.change(source, |own| own.remove(&ticket));
        Some(source)
    }

    /// Changes the tickets of one source, and updates its rank.
    fn change(&mut self, source: Source, change: impl FnOnce(&mut BTreeSet<Ticket>) -> bool) {
        let own = self.sources.entry(source).or_default();
        let before = own.len();
        change(own);
        let after = own.len();
        if after == 0 {
            self.sources.remove(&source);
        }
        if let Some(rank) = self.ranks.get_mut(&before) {
            rank.remove(&source);
            if rank.is_empty() {
                self.ranks.remove(&before);
            }
        }
        if after > 0 {
            self.ranks.entry(after).or_default().insert(source);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn source(number: u8) -> Source {
        Source::V4(Ipv4Addr::new(127, 0, 0, number))
    }

    #[test]
    fn addresses_that_one_host_owns_are_one_source() {
        let of = |text: &str| Source::from(text.parse::<SocketAddr>().unwrap());
        assert_eq!(of("127.0.0.1:1"), of("[::ffff:127.0.0.1]:2"));
        assert_ne!(of("127.0.0.1:1"), of("127.0.0.2:1"));
        assert_eq!(of("[2001:db8:1:2::1]:1"), of("[2001:db8:1:2:ffff::9]:1"));
        assert_ne!(of("[2001:db8:1:2::1]:1"), of("[2001:db8:1:3::1]:1"));
        assert_eq!(of("[2001:db8:1:2::1]:1").to_string(), "2001:db8:1:2::/64");
        assert_eq!(of("10.0.0.1:7").to_string(), "10.0.0.1");
    }

    #[test]
    fn a_flood_displaces_itself_and_nobody_else() {
        let mut admissions = Admissions::new(64, 32);
        let (client, evicted) = admissions.admit(source(1));
        assert_eq!(evicted, None);
        for _ in 0..5000 {
            let (_, evicted) = admissions.admit(source(2));
            assert!(evicted.is_none_or(|(_, from)| from == source(2)));
        }
        assert_eq!(
            admissions.remove(client),
            Some(source(1)),
            "it is still there"
        );
    }

    #[test]
    fn a_client_of_a_flooding_address_stays_for_as_many_arrivals_as_the_bound() {
        let mut admissions = Admissions::new(64, 32);
        for _ in 0..5000 {
            admissions.admit(source(2));
        }
        let (client, _) = admissions.admit(source(2));
        for _ in 1..32 {
            admissions.admit(source(2));
        }
        assert_eq!(admissions.remove(client), Some(source(2)));
    }

    #[test]
    fn the_bounds_leave_most_descriptors_to_what_the_process_is_for() {
        for files in [1024, 4096, 65_536, 1 << 20] {
            let bounds = Bounds::of(files);
            assert!(
                bounds.descriptors() as u64 <= files / 4,
                "{files}: {bounds:?}"
            );
        }
    }

    proptest! {
        /// Compares with a model that keeps a list: the bounds hold, and the evicted connection is the oldest of a
        /// busiest source.
        #[test]
        fn the_oldest_of_the_busiest_source_goes_first(
            arrivals in prop::collection::vec((0_u8..6, any::<bool>()), 1..300),
            overall in 2_usize..20,
        ) {
            let mut admissions = Admissions::new(overall, overall / 2);
            let mut model: Vec<(Ticket, Source)> = Vec::new();
            for (number, leaves) in arrivals {
                let from = source(number);
                if leaves && let Some(at) = model.iter().position(|(_, own)| *own == from) {
                    let (ticket, _) = model.remove(at);
                    prop_assert_eq!(admissions.remove(ticket), Some(from));
                    prop_assert_eq!(admissions.remove(ticket), None);
                    continue;
                }
                let (ticket, evicted) = admissions.admit(from);
                model.push((ticket, from));
                let count = |model: &[(Ticket, Source)], of| {
                    model.iter().filter(|(_, own)| *own == of).count()
                };
                let most = (0..6).map(|n| count(&model, source(n))).max().unwrap();
                let full = model.len() > overall || count(&model, from) > overall / 2;
                prop_assert_eq!(evicted.is_some(), full);
                if let Some((gone, of)) = evicted {
                    prop_assert_ne!(gone, ticket, "never the new one");
                    prop_assert_eq!(count(&model, of), most, "of a busiest source");
                    let oldest = model.iter().position(|(_, own)| *own == of).unwrap();
                    prop_assert_eq!(model.remove(oldest).0, gone, "its oldest");
                }
                prop_assert_eq!(admissions.len(), model.len());
                prop_assert!(model.len() <= overall);
                for number in 0..6 {
                    prop_assert!(count(&model, source(number)) <= overall / 2);
                }
            }
        }
    }
}
