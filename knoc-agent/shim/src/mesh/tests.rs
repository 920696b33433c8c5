//! What the agent says, and what it is asked.

use super::*;

const OWN: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 3);
const OTHER: Ipv4Addr = Ipv4Addr::new(10, 200, 0, 7);

fn mesh() -> Arc<Mesh> {
    Mesh::of(&pb::PodSpec {
        pod_range: "10.200.0.0/16".to_owned(),
        ..pb::PodSpec::default()
    })
}

fn address(address: &str, why: &str) -> pb::MeshControl {
    let told = pb::MeshAddress {
        address: address.to_owned(),
        why: why.to_owned(),
        ranges: Vec::new(),
    };
    pb::MeshControl {
        control: Some(Control::Address(told)),
    }
}

#[test]
fn a_pod_gets_its_address_once() {
    let mesh = mesh();
    let given = || mesh.given.borrow().clone();
    assert_eq!(given(), Given::Unknown);
    mesh.obey(address("", "the range is used up")).unwrap();
    assert_eq!(given(), Given::Nothing("the range is used up".to_owned()));
    for wrong in ["10.201.0.3", "web-0"] {
        let refused = mesh.obey(address(wrong, "")).unwrap_err();
        assert!(refused.message().contains(wrong), "{refused}");
    }
    mesh.obey(address("10.200.0.3", "")).unwrap();
    assert_eq!(given(), Given::Address(OWN));
    // A new call of the agent repeats it.
    mesh.obey(address("10.200.0.3", "")).unwrap();
    mesh.obey(address("", "the agent has lost it")).unwrap();
    let refused = mesh.obey(address("10.200.0.4", "")).unwrap_err();
    assert!(
        refused.message().contains("10.200.0.3 already"),
        "{refused}"
    );
    assert_eq!(given(), Given::Address(OWN));
    let without = Mesh::of(&pb::PodSpec::default());
    without.obey(address("10.200.0.3", "")).unwrap_err();
}

#[test]
fn the_agent_is_told_where_tunnels_are_taken_and_asked_once_for_each_address() {
    let mesh = mesh();
    let here = Some("10.0.0.7:4001".parse().unwrap());
    let mut told = Told::default();
    let next = |told: &mut Told, here| {
        let (question, id) = told.next(here, &mesh.members.borrow())?;
        told.note(&question, id, here);
        Some(question)
    };
    assert_eq!(next(&mut told, None), None);
    let wanted = mesh.want(OTHER).unwrap();
    let place = Some(Question::Endpoint("10.0.0.7:4001".to_owned()));
    assert_eq!(next(&mut told, here), place);
    let ask = Some(Question::Ask(OTHER.to_string()));
    assert_eq!(next(&mut told, here), ask);
    assert_eq!(next(&mut told, here), None);
    let again = mesh.want(OTHER).unwrap();
    drop(wanted);
    assert_eq!(next(&mut told, here), None);
    drop(again);
    let forget = Some(Question::Forget(OTHER.to_string()));
    assert_eq!(next(&mut told, here), forget);
    assert_eq!(next(&mut told, here), None);
}

#[test]
fn whoever_uses_an_address_hears_of_every_change() {
    let mesh = mesh();
    let mut members = mesh.members.subscribe();
    let _wanted = mesh.want(OTHER).unwrap();
    members.borrow_and_update();
    let told = |state: pb::MeshMemberState| pb::MeshControl {
        control: Some(Control::Member(pb::MeshMember {
            address: OTHER.to_string(),
            state: state.into(),
            ..pb::MeshMember::default()
        })),
    };
    let nobody = || told(pb::MeshMemberState::Nobody);
    mesh.obey(nobody()).unwrap();
    assert!(members.has_changed().unwrap());
    members.borrow_and_update();
    mesh.obey(nobody()).unwrap();
    assert!(!members.has_changed().unwrap());
    // A member without a key.
    mesh.obey(told(pb::MeshMemberState::Present)).unwrap_err();
    mesh.obey(pb::MeshControl::default()).unwrap();
}

#[test]
fn pods_of_other_nodes_are_reached_once_the_agent_names_their_range() {
    let mesh = mesh();
    let other = Ipv4Addr::new(10, 201, 0, 7);
    assert!(mesh.reaches(OTHER) && !mesh.reaches(other));
    let mut ranges = mesh.ranges.subscribe();
    let control = pb::MeshControl {
        control: Some(Control::Address(pb::MeshAddress {
            address: OWN.to_string(),
            ranges: ["10.200.0.0/16", "10.201.0.0/16", "127.0.0.0/8", "x"]
                .map(str::to_owned)
                .into(),
            ..pb::MeshAddress::default()
        })),
    };
    mesh.obey(control.clone()).unwrap();
    assert!(mesh.reaches(other) && !mesh.reaches(Ipv4Addr::LOCALHOST));
    assert!(ranges.has_changed().unwrap());
    ranges.borrow_and_update();
    mesh.obey(control).unwrap();
    assert!(!ranges.has_changed().unwrap());
    let covers = |text: &str| mesh.covers(Range::parse(text).unwrap());
    assert!(covers("10.201.0.0/16") && covers("10.200.7.0/24") && !covers("10.200.0.0/15"));
    assert!(!Mesh::of(&pb::PodSpec::default()).reaches(OTHER));
}
