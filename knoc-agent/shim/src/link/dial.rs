//! Dials all addresses of the agent and keeps the first connection whose peer has the pinned key.
//!
//! A login node has several addresses, and a firewall may drop what is sent to some of them. So each address is tried a
//! little later than the one before it, without waiting for that one to fail.

use std::time::Duration;

use futures::{StreamExt as _, stream::FuturesUnordered};
use knoc_contract::jobdir::schema::Endpoint;
use knoc_link::{Connection, pinned::KeyPair};
use knoc_proto::{error::chain, pb};

/// The pause before the next address is tried as well.
const STAGGER: Duration = Duration::from_millis(200);
/// The most addresses that are tried.
const ADDRESSES: usize = 32;
/// The longest text about failures in a report, in bytes.
const TEXT: usize = 1000;

/// The connection and its address, or why no address worked.
pub(crate) type Dialled = Result<(String, Connection), String>;

/// Dials; cancel safe.
pub(crate) async fn any(addresses: &[String], pair: &KeyPair, spki: &str) -> Dialled {
    let mut after = Duration::ZERO;
    let mut tries = FuturesUnordered::new();
    for address in addresses.iter().take(ADDRESSES) {
        let pause = after;
        after += STAGGER;
        tries.push(async move {
            tokio::time::sleep(pause).await;
            let dialled = knoc_link::pinned::dial(address, pair, spki).await;
            dialled.map(|connection| (address.clone(), connection))
        });
    }
    let mut failures = Vec::new();
    while let Some(dialled) = tries.next().await {
        match dialled {
            Ok(connected) => return Ok(connected),
            Err(error) => failures.push(chain(&error)),
        }
    }
    Err(failures.join("; "))
}

/// PURE: what to report after a try. That the first address worked is not worth a report, unless another one was
/// reported before: the agent sees the link.
pub(super) fn found(
    before: &pb::ShimRoute,
    endpoint: &Endpoint,
    dialled: &Dialled,
) -> pb::ShimRoute {
    let mut route = before.clone();
    let first = endpoint.addresses.first();
    match dialled {
        Ok((address, _)) if before.trial == 0 && first == Some(address) => return route,
        Ok((address, _)) => {
            route.reached.clone_from(address);
            route.unreachable.clear();
        }
        // It is known, and nobody waits for the report.
        Err(_) if endpoint.isolated => return route,
        // The addresses of an agent that does not number its trials prove nothing.
        Err(_) if endpoint.trial == 0 => return route,
        // The same trial may fail in another way each time; one report is enough.
        Err(_) if before.trial == endpoint.trial && !before.unreachable.is_empty() => return route,
        Err(why) => {
            route.reached.clear();
            route.unreachable = why.chars().take(TEXT).collect();
            if route.unreachable.is_empty() {
                "the agent names no address".clone_into(&mut route.unreachable);
            }
        }
    }
    route.trial = endpoint.trial;
    route
}

#[cfg(test)]
mod tests {
    use super::*;

    fn endpoint(trial: i64) -> Endpoint {
        Endpoint {
            addresses: vec!["a:1".to_owned(), "b:1".to_owned()],
            spki: String::new(),
            trial,
            isolated: false,
        }
    }

    #[test]
    fn a_failed_try_is_reported_once_for_each_trial() {
        let fails = |why: &str| Err(why.to_owned());
        let none = pb::ShimRoute {
            socket: "/s".to_owned(),
            ..pb::ShimRoute::default()
        };
        let first = found(&none, &endpoint(5), &fails("refused"));
        assert_eq!((first.trial, &*first.unreachable), (5, "refused"));
        assert_eq!(first.socket, "/s");
        assert_eq!(found(&first, &endpoint(5), &fails("timed out")), first);
        let second = found(&first, &endpoint(6), &fails("timed out"));
        assert_eq!((second.trial, &*second.unreachable), (6, "timed out"));
        // An agent of an older version does not number its trials.
        assert_eq!(found(&none, &endpoint(0), &fails("refused")), none);
        let isolated = Endpoint {
            isolated: true,
            ..endpoint(9)
        };
        assert_eq!(found(&none, &isolated, &fails("refused")), none);
    }

    #[tokio::test]
    async fn the_address_that_answers_is_found_behind_those_that_do_not() {
        let pair = KeyPair::generate("agent").unwrap();
        let own = KeyPair::generate("shim").unwrap();
        let any_port = "127.0.0.1:0".parse().unwrap();
        let mut incoming = knoc_link::pinned::listen(any_port, pair.clone())
            .await
            .unwrap();
        let here = incoming.local_addr().unwrap().to_string();
        // Nobody listens on port 1, and connections to 192.0.2.1 (TEST-NET-1) are never answered.
        let mut endpoint = endpoint(7);
        endpoint.addresses = ["127.0.0.1:1", "192.0.2.1:9", &here]
            .map(str::to_owned)
            .to_vec();
        let dialled = any(&endpoint.addresses, &own, pair.spki());
        let (dialled, accepted) = tokio::join!(dialled, incoming.next());
        accepted.unwrap().unwrap();
        let route = found(&pb::ShimRoute::default(), &endpoint, &dialled);
        assert_eq!((&*route.reached, route.trial), (&*here, 7));
        assert!(route.unreachable.is_empty());
        let nobody = any(&endpoint.addresses[..1], &own, pair.spki()).await;
        assert!(nobody.unwrap_err().contains("127.0.0.1:1"));
    }
}
