//! Tests of what is checked of a request before the registry sees it.

use super::*;
use crate::app::fake::{self, Fake};

/// As of an agent that checked less: no mount can be there.
fn on_a_device(uid: &PodUid, path: &str) -> pb::PodSpec {
    let mut spec = fake::spec(uid);
    spec.volumes = vec![pb::Volume {
        name: "v".to_owned(),
        source: Some(pb::volume::Source::Files(pb::FilesVolume {})),
    }];
    spec.containers[0].mounts = vec![pb::Mount {
        volume: "v".to_owned(),
        path: path.to_owned(),
        ..pb::Mount::default()
    }];
    spec
}

#[tokio::test]
async fn a_known_pod_goes_on_with_what_was_accepted_and_a_new_one_does_not() {
    let fake = Fake::new("").await;
    let uid = uid("a").unwrap();
    let old = on_a_device(&uid, "/dev/null");
    let dir = fake.site.state.pod(&uid);
    let checked = async |spec: &pb::PodSpec, known| {
        let shape = shape(&fake.site, spec.clone(), known).await;
        shape.map(PodSpec::into_inner)
    };
    checked(&old, true).await.unwrap_err();
    dir.create().unwrap();
    let job = pb::JobFile {
        spec: Some(old.clone()),
        ..pb::JobFile::default()
    };
    dir.write_spec(&job).unwrap();
    assert_eq!(checked(&old, true).await.unwrap(), old);
    checked(&old, false).await.unwrap_err();
    let other = on_a_device(&uid, "/dev/zero");
    checked(&other, true).await.unwrap_err();
}
