//! The cases of the kubelet's own keyring, and what a Secret may hold.

use k8s_openapi::{ByteString, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use serde_json::{Value, json};

use super::*;

fn secret(kind: &str, key: &str, content: &str) -> Secret {
    Secret {
        metadata: ObjectMeta {
            uid: Some(format!("uid of {key}")),
            ..ObjectMeta::default()
        },
        type_: Some(kind.to_owned()),
        data: Some([(key.to_owned(), ByteString(content.into()))].into()),
        ..Secret::default()
    }
}

fn json_secret(auths: &Value) -> Secret {
    secret(JSON_TYPE, JSON_KEY, &json!({ "auths": auths }).to_string())
}

fn pod(images: &[&str], secrets: &[&str]) -> Pod {
    let containers = images.iter().enumerate();
    let containers: Vec<_> = containers
        .map(|(number, image)| json!({"name": format!("c{number}"), "image": image}))
        .collect();
    let secrets: Vec<_> = secrets.iter().map(|name| json!({ "name": name })).collect();
    let spec = json!({"containers": containers, "imagePullSecrets": secrets});
    serde_json::from_value(json!({"metadata": {}, "spec": spec})).unwrap()
}

/// The passwords for an image, in their order.
fn passwords(auths: &Value, image: &str) -> Vec<String> {
    let secrets = [("s".to_owned(), json_secret(auths))].into();
    let found = pull_credentials(&pod(&[image], &["s"]), &secrets).unwrap();
    let images = found.credentials.images.into_iter();
    let logins = images.flat_map(|image| image.logins);
    logins.map(|login| login.password).collect()
}

#[test]
fn locations_fit_images_as_in_a_kubelet() {
    let cases = [
        ("quay.io", "quay.io/a/b:1", true),
        ("https://quay.io", "quay.io/a/b", true),
        ("http://quay.io/v2/", "quay.io/a/b", true),
        ("quay.io/a", "quay.io/a/b", true),
        ("quay.io/a", "quay.io/ab/c", true),
        ("quay.io/b", "quay.io/a/b", false),
        ("*.io", "quay.io/a", true),
        ("*.example.org", "a.example.org/x", true),
        ("*.example.org", "a.b.example.org/x", false),
        ("*.*.example.org", "a.b.example.org/x", true),
        // It begins a query, as in every URL.
        ("reg?.example.org", "reg1.example.org/x", false),
        ("reg[0-9].example.org", "reg1.example.org/x", true),
        ("reg[^0-9].example.org", "reg1.example.org/x", false),
        ("reg[.example.org", "reg[.example.org/x", false),
        ("*", "quay.io/a", false),
        ("quay.io:5000", "quay.io/a", false),
        ("quay.io", "quay.io:5000/a", false),
        ("quay.io:5000", "quay.io:5000/a", true),
        ("*.io:5000", "quay.io:5000/a", true),
        ("[::1]:5000", "[::1]:5000/a", true),
        ("localhost:5000", "localhost:5000/a@sha256:00", true),
        ("https://index.docker.io/v1/", "busybox", true),
        ("index.docker.io", "a/b:tag", true),
        ("https://index.docker.io/v1/", "docker.io/a/b", true),
        ("https://index.docker.io/v1/", "index.docker.io/a/b", true),
        ("docker.io", "busybox", true),
        ("docker.io/library", "docker://busybox:1", true),
        ("docker.io/a", "busybox", false),
        ("https://index.docker.io/v1/", "quay.io/a", false),
        ("*", "/images/x.sif", false),
        ("Quay.io/a", "quay.io/a/b", true),
        ("HTTPS://*.IO:5000", "Quay.io:5000/a", true),
        ("https://Index.Docker.io/v1/", "Docker.IO/a/b", true),
        // The case of a path counts.
        ("quay.io/A", "quay.io/a/b", false),
    ];
    for (location, image, fits) in cases {
        let auths = json!({location: {"username": "u", "password": "p"}});
        let found = passwords(&auths, image);
        assert_eq!(!found.is_empty(), fits, "{location} for {image}");
    }
}

#[test]
fn the_most_specific_location_is_tried_first() {
    let auth = |password: &str| json!({"username": "u", "password": password});
    let auths = json!({
        "quay.io": auth("host"), "quay.io/a/b": auth("longest"), "quay.io/a": auth("long"), "*.io": auth("glob"),
        "docker.io": auth("other"), "https://index.docker.io/v1/": auth("hub"),
    });
    assert_eq!(
        passwords(&auths, "quay.io/a/b/c"),
        ["longest", "long", "host", "glob"]
    );
    // Docker Hub's own location counts only if no other fits.
    assert_eq!(passwords(&auths, "busybox"), ["other", "glob"]);
}

#[test]
fn both_kinds_of_secrets_are_read_in_the_order_of_the_pod() {
    let encoded = |text: &str| STANDARD.encode(text);
    let legacy = json!({"quay.io": {"auth": encoded("ann:pa:ss"), "email": "a@b"}}).to_string();
    let unpadded = encoded("bob:x").trim_end_matches('=').to_owned();
    let mut newer = json_secret(&json!({"quay.io": {"username": "no", "auth": unpadded}}));
    newer.metadata.uid = Some("newer".to_owned());
    let secrets = [
        ("old".to_owned(), secret(LEGACY_TYPE, LEGACY_KEY, &legacy)),
        ("new".to_owned(), newer),
        ("opaque".to_owned(), secret("Opaque", JSON_KEY, "{}")),
        ("empty".to_owned(), secret(JSON_TYPE, "other", "{}")),
    ]
    .into();
    let pod = pod(
        &["quay.io/x", "busybox", "quay.io/x"],
        &["new", "old", "new", "none", "opaque", "empty"],
    );
    let found = pull_credentials(&pod, &secrets).unwrap();
    assert_eq!(found.missing, ["none"]);
    assert_eq!(found.unused.len(), 2, "{:?}", found.unused);
    assert!(found.unused[0].contains("opaque"), "{:?}", found.unused);
    let [image] = found.credentials.images.as_slice() else {
        panic!("one image has credentials")
    };
    let logins = image.logins.iter();
    let logins =
        logins.map(|it| [&*it.username, &*it.password, &*it.secret_uid].map(str::to_owned));
    assert_eq!(
        logins.collect::<Vec<_>>(),
        [["bob", "x", "newer"], ["ann", "pa:ss", "uid of .dockercfg"]]
    );
    assert!(!format!("{found:?}").contains("pa:ss"));
}

#[test]
fn a_secret_that_cannot_be_read_is_named_and_not_quoted() {
    let long = "x".repeat(RegistryLogin::MAX_LENGTH + 1);
    let cases = [
        (
            r#"{"auths": {"quay.io": {"password": 123456}}}"#.to_owned(),
            "line 1",
        ),
        (r#"{"auths": [123456]}"#.to_owned(), "line 1"),
        (
            json!({"auths": {"quay.io": {"auth": STANDARD.encode("123456")}}}).to_string(),
            "[\"quay.io\"].auth",
        ),
        (
            r#"{"auths": {"quay.io": {"auth": "123456!"}}}"#.to_owned(),
            "base64",
        ),
        (
            json!({"auths": {"quay.io": {"password": long}}}).to_string(),
            "longer",
        ),
    ];
    for (content, expected) in cases {
        let secrets = [("s".to_owned(), secret(JSON_TYPE, JSON_KEY, &content))].into();
        let error = pull_credentials(&pod(&["quay.io/x"], &["s"]), &secrets).unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("image pull secret \"s\": .dockerconfigjson"),
            "{text}"
        );
        assert!(
            text.contains(expected) && !text.contains("123456"),
            "{text}"
        );
    }
}

#[test]
fn a_pattern_takes_no_longer_than_its_length_times_the_text() {
    let pattern = "*a".repeat(2000);
    assert!(!matches(&pattern, &"a".repeat(1999)));
    assert!(matches(&pattern, &"a".repeat(2000)));
    for (pattern, text, fits) in [
        ("", "", true),
        ("*", "", true),
        ("a*b*c", "a-b-b-c", true),
        ("a*b*c", "a-b-b-", false),
        ("\\*", "*", true),
        ("\\*", "a", false),
        ("[a-]", "a", false),
        ("[a", "a", false),
        ("a\\", "a", false),
    ] {
        assert_eq!(matches(pattern, text), fits, "{pattern} {text}");
    }
}

#[test]
fn names_become_repositories() {
    for (image, expected) in [
        ("busybox", Some("docker.io/library/busybox")),
        ("a/b:1@sha256:00", Some("docker.io/a/b")),
        ("ctl:5000/x:1", Some("ctl:5000/x")),
        ("ctl:5000/x/y@sha256:00", Some("ctl:5000/x/y")),
        ("docker://localhost/x", Some("localhost/x")),
        ("LocalHost/x", Some("localhost/x")),
        ("INDEX.docker.io/x:T", Some("docker.io/library/x")),
        ("oras://ctl:5000/a/b:1", Some("ctl:5000/a/b")),
        ("library://a/b/c:1", None),
        ("/x.sif", None),
        ("", None),
    ] {
        assert_eq!(repository(image).as_deref(), expected, "{image}");
    }
}

#[test]
fn credentials_that_fit_very_many_images_are_not_copied_for_all_of_them() {
    let images: Vec<_> = (0..5000)
        .map(|n| format!("registry.example/app{n:04}"))
        .collect();
    let images: Vec<_> = images.iter().map(String::as_str).collect();
    let found = |password: &str| {
        let auths = json!({"registry.example": {"username": "u", "password": password}});
        let secrets = [("s".to_owned(), json_secret(&auths))].into();
        pull_credentials(&pod(&images, &["s"]), &secrets).unwrap()
    };
    let usual = found("secret");
    assert_eq!(usual.credentials.images.len(), images.len());
    assert!(usual.unused.is_empty(), "{:?}", usual.unused);
    let large = found(&"x".repeat(8000));
    let count = large.credentials.images.len();
    assert!((200..=MOST / 8000).contains(&count), "{count}");
    let next = format!("none for \"{}\"", images[count]);
    assert!(large.unused[0].contains(&next), "{:?}", large.unused);
    // Nothing shows a password.
    assert!(!large.unused[0].contains("xx"), "{:?}", large.unused);
}

#[test]
fn thousands_of_images_are_looked_up_in_thousands_of_locations_without_a_comparison_of_each_with_each()
 {
    let images: Vec<_> = (0..5000)
        .map(|n| format!("r{n}.example/team/app:1"))
        .collect();
    let images: Vec<_> = images.iter().map(String::as_str).collect();
    let login = json!({"username": "u", "password": "p"});
    let of = |locations: &mut dyn Iterator<Item = String>| {
        let auths: serde_json::Map<String, Value> = locations
            .map(|location| (location, login.clone()))
            .collect();
        let secrets = [("s".to_owned(), json_secret(&Value::Object(auths)))].into();
        pull_credentials(&pod(&images, &["s"]), &secrets).unwrap()
    };
    let plain = of(&mut (0..5000).map(|n| format!("r{n}.example/team")));
    assert_eq!(plain.credentials.images.len(), images.len());
    assert!(plain.unused.is_empty(), "{:?}", plain.unused);
    // Some patterns are compared with all.
    let few = of(&mut (0..20).map(|n| format!("*{n}.example")));
    assert!(!few.credentials.images.is_empty());
    assert!(few.unused.is_empty(), "{:?}", few.unused);
    // Very many are not.
    let many = of(&mut (0..5000).map(|n| format!("*{n}.example")));
    assert!(many.credentials.images.len() < images.len());
    assert!(
        many.unused[0].contains("too many patterns"),
        "{:?}",
        many.unused
    );
}

#[test]
fn an_address_fits_however_it_is_written() {
    let auths = json!({"::1:5000": {"username": "u", "password": "p"}});
    assert_eq!(passwords(&auths, "[::1]:5000/a"), ["p"]);
    let auths = json!({"quay.io:": {"username": "u", "password": "p"}});
    assert_eq!(passwords(&auths, "quay.io/a"), ["p"]);
}
