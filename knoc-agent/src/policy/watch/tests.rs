use std::path::Path;

use knoc_contract::jobdir::atomic;
use knoc_link::{Identity, pki::Ca};
use tokio::sync::watch;

use super::*;
use crate::{config::Home, policy::Live};

struct Fake {
    folder: tempfile::TempDir,
    watcher: Watcher,
    live: Live,
    rules: watch::Receiver<Arc<Rules>>,
    ca: Ca,
}

impl Fake {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ca = Ca::generate("ca").unwrap();
        let who = Identity::Agent { site: "t".into() };
        let pair = ca.issue(&who, &[]).unwrap();
        let path = folder.path();
        put(&path.join("ca.crt"), ca.cert_pem());
        put(&path.join("agent.crt"), &pair.cert_pem);
        put(&path.join("agent.key"), &pair.key_pem);
        put(&path.join("agent.toml"), &site(""));
        let home = Home {
            home: path.to_owned(),
        };
        let config = Config::load(&path.join("agent.toml"), &home).unwrap();
        let [ca_file, cert, key] = ["ca.crt", "agent.crt", "agent.key"].map(|name| path.join(name));
        let credentials = Credentials::from_files(ca_file, cert, key).unwrap();
        let (publisher, live) = Live::new(config.policy.clone());
        let (rules_to, rules) = watch::channel(Arc::default());
        let watcher = Watcher::new(&config, Some(credentials), publisher, rules_to);
        Self {
            folder,
            watcher,
            live,
            rules,
            ca,
        }
    }

    fn put(&self, name: &str, text: &str) {
        put(&self.folder.path().join(name), text);
    }

    /// Reads the files once; true if rules were published.
    fn look(&mut self) -> bool {
        self.rules.mark_unchanged();
        let changed = self.watcher.files.look();
        self.watcher.publish(changed);
        self.rules.has_changed().unwrap()
    }
}

fn put(path: &Path, text: &str) {
    atomic::write(path, text.as_bytes(), 0o600).unwrap();
}

fn site(policy: &str) -> String {
    format!("site = \"t\"\nruntime = \"process\"\n[policy]\n{policy}\n")
}

#[tokio::test]
async fn the_whole_table_changes_at_once_and_a_faulty_file_changes_nothing() {
    let mut fake = Fake::new();
    assert!(!fake.look(), "nothing has changed");
    let text = site("denied = [\"ctl/x\"]\nnamespaces = [\"a\"]\npartitions = [\"p\"]");
    fake.put("agent.toml", &text);
    assert!(fake.look());
    let policy = fake.live.now();
    assert_eq!(policy.denied, ["ctl/x"]);
    assert_eq!(policy.namespaces, ["a"]);
    assert_eq!(policy.partitions, ["p"]);
    assert_eq!(fake.live.problem(), None);
    for faulty in [
        site("denied = [\"nonsense\"]"),
        site("clients = 3"),
        "site = ".to_owned(),
        String::new(),
        "#".repeat(2 << 20),
    ] {
        fake.put("agent.toml", &faulty);
        assert!(!fake.look(), "{faulty:.80}");
        assert_eq!(fake.live.now(), policy);
        let problem = fake.live.problem().unwrap();
        assert!(problem.contains("agent.toml"), "{problem}");
    }
    std::fs::remove_file(fake.folder.path().join("agent.toml")).unwrap();
    assert!(!fake.look());
    assert!(fake.live.problem().is_some());
    fake.put("agent.toml", &site(""));
    assert!(fake.look());
    assert_eq!(fake.live.problem(), None);
    assert!(fake.live.now().denied.is_empty());
}

/// Size, modification time and inode are unchanged: on a network file system attributes may be old.
#[tokio::test]
async fn a_change_is_seen_by_its_content() {
    let mut fake = Fake::new();
    let path = fake.folder.path().join("agent.toml");
    fake.put("agent.toml", &site("denied = [\"ctl/x\"]"));
    assert!(fake.look());
    let meta = std::fs::metadata(&path).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, site("denied = [\"ctl/y\"]").as_bytes(), 0)
        .unwrap();
    file.set_modified(meta.modified().unwrap()).unwrap();
    assert!(fake.look());
    assert_eq!(fake.live.now().denied, ["ctl/y"]);
}

#[tokio::test]
async fn a_changed_ca_counts_and_a_broken_one_does_not() {
    let mut fake = Fake::new();
    let other = Ca::generate("other").unwrap();
    fake.put("ca.crt", "no PEM");
    assert!(!fake.look());
    assert!(fake.live.problem().unwrap().contains("ca.crt"));
    fake.put(
        "ca.crt",
        &format!("{}{}", fake.ca.cert_pem(), other.cert_pem()),
    );
    assert!(fake.look());
    assert_eq!(fake.live.problem(), None);
    assert!(!fake.look());
    // A handshake that sees the change first does not hide it from the watcher.
    fake.put("ca.crt", other.cert_pem());
    let read = fake.watcher.files.credentials.as_ref().unwrap().reread();
    read.unwrap();
    assert!(fake.look());
}
