use k8s_openapi::api::core::v1::Pod;
use knoc_translate::verdict::Findings;
use serde_json::json;
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
};
use tonic::transport::Endpoint;

use super::{wanted::Listener, *};
use crate::{node::PodIp, pods::events::Notes};

/// The task with an agent that nobody reaches, and the Events that it sends.
fn task() -> (PodListeners, Notes) {
    // Nothing listens on this port.
    let channel = Endpoint::from_static("http://127.0.0.1:1").connect_lazy();
    let (events, notes) = Events::channel();
    let store = Store::default();
    let pod = json!({"metadata": {"namespace": "team", "name": "web", "uid": "u-1"}});
    let pod: Pod = serde_json::from_value(pod).unwrap();
    let findings = Arc::new(Findings::default());
    store.set_desired(&uid(), Arc::new(pod), findings);
    let setup = Setup {
        unit: Arc::new(Unit::fixture(PodIp::Own, Some("10.200.0.0/16"))),
        agent: Agent::new(channel.clone(), channel, "c"),
        store,
        services: Services::default(),
        events,
        traffic: Direction::default(),
    };
    (PodListeners::new(setup, Cluster::default()), notes)
}

fn uid() -> PodUid {
    "u-1".parse().unwrap()
}

fn wanted(listeners: &[(u16, SocketAddr)]) -> Wanted {
    let listeners = listeners.iter().map(|(number, at)| {
        let key = PodPort {
            uid: uid(),
            number: *number,
        };
        let listener = Listener {
            at: *at,
            namespace: "team".into(),
            named: true,
        };
        (key, listener)
    });
    Wanted {
        listeners: listeners.collect(),
        refused: Vec::new(),
    }
}

async fn free() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    listener.local_addr().unwrap()
}

#[tokio::test]
async fn listeners_follow_what_is_wanted() {
    let (mut task, _notes) = task();
    let (one, other) = (free().await, free().await);
    assert_eq!(task.follow(&wanted(&[(80, one)])).await, None);
    let mut client = TcpStream::connect(one).await.unwrap();
    let error = client.read(&mut [0]).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    // The pod has another address, and one more port.
    let more = free().await;
    assert_eq!(task.follow(&wanted(&[(80, other), (81, more)])).await, None);
    task.listeners.joined().await;
    let refused = TcpStream::connect(one).await.unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    TcpStream::connect(other).await.unwrap();
    TcpStream::connect(more).await.unwrap();
    assert_eq!(task.follow(&Wanted::default()).await, None);
    assert!(task.listeners.addresses().is_empty());
}

/// A pod is gone, and another one has its address before the next round.
#[tokio::test]
async fn an_address_that_another_pod_has_now_changes_hands_without_a_failure() {
    let (mut task, _notes) = task();
    let at = free().await;
    let other = PodPort {
        uid: "u-2".parse().unwrap(),
        number: 80,
    };
    assert_eq!(task.follow(&wanted(&[(80, at)])).await, None);
    let mut moved = wanted(&[(80, at)]);
    let listener = moved.listeners.pop_first().unwrap().1;
    moved.listeners.insert(other.clone(), listener);
    let again = task.follow(&moved).await;
    assert!(
        again.is_some_and(|again| again <= Instant::now()),
        "{again:?}"
    );
    assert!(
        task.listeners.addresses().is_empty(),
        "nobody reaches the first pod there"
    );
    task.listeners.joined().await;
    assert_eq!(task.follow(&moved).await, None);
    assert_eq!(task.listeners.addresses().get(&other), Some(&at));
}

#[tokio::test]
async fn an_address_that_is_taken_is_told_once_and_tried_again() {
    let (mut task, mut notes) = task();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = taken.local_addr().unwrap();
    let next = task.follow(&wanted(&[(80, at)])).await;
    assert!(next.is_some_and(|next| next > Instant::now()), "{next:?}");
    let note = notes.recv().await.unwrap();
    assert_eq!(note.reason, FAILED);
    assert!(note.message.contains("another program"), "{note:?}");
    assert!(note.message.contains(&at.to_string()), "{note:?}");
    // It is not tried before it is due, and a second failure is no news.
    drop(taken);
    assert_eq!(task.follow(&wanted(&[(80, at)])).await, next);
    assert!(task.listeners.addresses().is_empty());
    let key = PodPort {
        uid: uid(),
        number: 80,
    };
    let again = wanted(&[(80, at)]);
    let listener = &again.listeners[&key];
    task.failed(&key, listener, &io::ErrorKind::AddrInUse.into());
    task.retries = Retries::new();
    assert_eq!(task.follow(&wanted(&[(80, at)])).await, None);
    drop(task);
    assert!(notes.recv().await.is_none(), "one Event only");
}

/// Clients take it by themselves: the pod asked for nothing.
#[tokio::test]
async fn a_port_that_nobody_names_is_tried_again_and_not_told() {
    let (mut task, mut notes) = task();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut unnamed = wanted(&[(80, taken.local_addr().unwrap())]);
    for listener in unnamed.listeners.values_mut() {
        listener.named = false;
    }
    assert!(task.follow(&unnamed).await.is_some());
    drop(task);
    assert!(notes.recv().await.is_none(), "no Event");
}

#[tokio::test]
async fn a_pod_for_which_nothing_may_listen_is_told_once() {
    let (mut task, mut notes) = task();
    let policy = "deny".to_owned();
    let refused = Wanted {
        refused: vec![(uid(), wanted::Refusal::Policy { policy })],
        ..Wanted::default()
    };
    task.follow(&refused).await;
    task.follow(&refused).await;
    drop(task);
    let note = notes.recv().await.unwrap();
    assert_eq!(note.reason, REFUSED);
    assert!(notes.recv().await.is_none(), "one Event only");
}

/// A policy may select any pod.
#[tokio::test]
async fn nothing_is_wanted_before_the_policies_were_read() {
    let (task, _notes) = task();
    assert_eq!(task.wanted(), None);
}
