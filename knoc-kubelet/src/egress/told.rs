//! PURE: which refusals a pod was told of, and what the node was told of, so that each is one Event.

use std::collections::{HashMap, HashSet};

use knoc_proto::ids::PodUid;

/// The most refusals that one pod is told of. A program that tries every port must not use up the Events of its pod.
const OF_ONE: usize = 10;
/// The most pods that are remembered.
const PODS: usize = 4096;

/// What was told.
#[derive(Debug, Default)]
pub(crate) struct Told(HashMap<PodUid, HashSet<String>>);

impl Told {
    /// Is this news for the pod?
    pub(crate) fn is_news(&mut self, uid: &PodUid, text: &str) -> bool {
        if self.0.len() >= PODS && !self.0.contains_key(uid) {
            self.0.clear();
        }
        let told = self.0.entry(uid.clone()).or_default();
        told.len() < OF_ONE && told.insert(text.to_owned())
    }
}

/// What the node was told of that still holds.
#[derive(Debug, Default)]
pub(crate) struct Troubles(HashSet<String>);

impl Troubles {
    /// Those that the node was not told of. One that was gone is told again.
    pub(crate) fn news(&mut self, now: Vec<String>) -> Vec<String> {
        let news = now.iter().filter(|one| !self.0.contains(*one));
        let news = news.cloned().collect();
        self.0 = now.into_iter().collect();
        news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trouble_is_told_once_until_it_is_gone() {
        let mut told = Troubles::default();
        let mut news = |now: &[&str]| {
            let now = now.iter().map(|one| (*one).to_owned()).collect();
            told.news(now).join(" ")
        };
        assert_eq!(news(&[]), "");
        assert_eq!(news(&["a"]), "a");
        assert_eq!(news(&["a", "b"]), "b");
        assert_eq!(news(&["b"]), "");
        assert_eq!(news(&["a", "b"]), "a");
    }

    #[test]
    fn each_refusal_is_told_once_and_not_too_many() {
        let (mut told, uid) = (Told::default(), PodUid::try_from("u").unwrap());
        let other = PodUid::try_from("v").unwrap();
        assert!(told.is_news(&uid, "a") && !told.is_news(&uid, "a") && told.is_news(&other, "a"));
        let news = (0..100).filter(|number| told.is_news(&uid, &number.to_string()));
        assert_eq!(news.count(), OF_ONE - 1);
        for number in 0..2 * PODS {
            told.is_news(&PodUid::try_from(format!("p{number}")).unwrap(), "a");
            assert!(told.0.len() <= PODS);
        }
    }
}
