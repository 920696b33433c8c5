//! From the first certificate to later ones, through restarts, denied requests and failures.

use std::os::unix::fs::PermissionsExt as _;

use super::*;
use crate::certs::plan::Facts;

fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_self_signed_certificate_survives_a_restart_and_is_renewed() {
    let (folder, began) = (folder(), Instant::now());
    let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
    let start = || Running::start(wanted.clone(), folder.path(), Issuer::SelfSigned, began);
    let mut first = start().await;
    first.valid().await;
    let pair = first.pair().unwrap();
    let facts = Facts::of(&pair).unwrap();
    assert!(facts.fits(&wanted), "{facts:?}");
    let mode = std::fs::metadata(folder.path().join("serving.pem")).unwrap();
    assert_eq!(mode.permissions().mode() & 0o777, 0o600);
    first.kill().await;
    let mut second = start().await;
    assert_eq!(
        second.pair().unwrap(),
        pair,
        "available at once, and the same"
    );
    let old = second.valid().await;
    let newer = second.until("renewed", |health| *health != old).await;
    let Health::Valid { .. } = newer else {
        panic!("{newer:?}")
    };
    let part = began.elapsed().as_secs_f64() / Duration::from_hours(365 * 24).as_secs_f64();
    assert!(
        (0.69..0.91).contains(&part),
        "renewed after {part} of its life"
    );
    assert_ne!(second.pair().unwrap(), pair);
}

#[tokio::test(start_paused = true)]
async fn another_address_wants_another_certificate_at_once() {
    let (folder, began) = (folder(), Instant::now());
    let start = |address| {
        let wanted = wanted(Purpose::Serving, &[address]);
        Running::start(wanted, folder.path(), Issuer::SelfSigned, began)
    };
    let mut first = start("10.0.0.7").await;
    first.valid().await;
    first.kill().await;
    let mut second = start("10.0.0.8").await;
    second.valid().await;
    let facts = Facts::of(&second.pair().unwrap()).unwrap();
    assert_eq!(facts.names, ["10.0.0.8".to_owned()].into());
    assert!(began.elapsed() < Duration::from_mins(1));
}

#[tokio::test(start_paused = true)]
async fn a_request_waits_through_restarts_for_its_approval() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    let issuer = Issuer::Authority(authority.clone());
    let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
    let start = || Running::start(wanted.clone(), folder.path(), issuer.clone(), began);
    let mut first = start().await;
    let name = first.waits().await;
    let note = first.notes.recv().await.unwrap();
    assert_eq!(note.reason, "CertificateAwaitsApproval");
    let command = format!("kubectl certificate approve {name}");
    assert!(note.message.contains(&command), "{}", note.message);
    let provisional = first.pair().unwrap();
    assert!(Facts::of(&provisional).unwrap().fits(&wanted));
    first.kill().await;
    let mut second = start().await;
    assert_eq!(
        second.waits().await,
        name,
        "the same key, so the same request"
    );
    assert_eq!(authority.names(), std::slice::from_ref(&name));
    assert_ne!(second.pair().unwrap(), provisional, "not stored");
    authority.approve(&name);
    second.valid().await;
    let kept = second.pair().unwrap();
    second.kill().await;
    let third = start().await;
    assert_eq!(third.pair().unwrap(), kept);
}

#[tokio::test(start_paused = true)]
async fn a_node_has_no_client_certificate_before_its_approval_and_renews_without_a_gap() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    let issuer = Issuer::Authority(authority.clone());
    let wanted = wanted(Purpose::Client, &[]);
    let mut task = Running::start(wanted, folder.path(), issuer, began).await;
    let first = task.waits().await;
    assert!(task.pair().is_none());
    authority.approve(&first);
    task.valid().await;
    let old = task.pair().unwrap();
    let second = task.waits().await;
    assert_ne!(first, second, "a new key for each certificate");
    assert_eq!(
        task.pair().unwrap(),
        old,
        "the old certificate stays in use"
    );
    let condition = task.health.borrow().condition().unwrap();
    assert_eq!(condition.0, "True");
    authority.approve(&second);
    task.valid().await;
    assert_ne!(task.pair().unwrap(), old);
}

#[tokio::test(start_paused = true)]
async fn over_ten_years_of_approvals_there_is_always_a_valid_certificate() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    authority.with(|state| {
        state.approve_all = true;
        state.life = Duration::from_hours(24 * 30);
    });
    let wanted = wanted(Purpose::Client, &[]);
    let issuer = Issuer::Authority(authority.clone());
    let mut task = Running::start(wanted, folder.path(), issuer, began).await;
    task.valid().await;
    for day in 0..3650 {
        tokio::time::sleep(Duration::from_hours(24)).await;
        let facts = Facts::of(&task.pair().unwrap()).unwrap();
        assert!(
            crate::certs::plan::is_valid(&facts, now(began)),
            "day {day}: {facts:?}"
        );
    }
    let requests = authority.names().len();
    assert!(
        (3650 / 27..=3650 / 20).contains(&requests),
        "{requests} requests"
    );
}

#[tokio::test(start_paused = true)]
async fn a_denied_request_is_reported_and_repeated_later() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    let issuer = Issuer::Authority(authority.clone());
    let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
    let mut task = Running::start(wanted, folder.path(), issuer, began).await;
    let first = task.waits().await;
    authority.answer(&first, Answer::Rejected("Denied: not this one".to_owned()));
    let failing = |health: &Health| matches!(health, Health::Failing { .. });
    let health = task.until("failing", failing).await;
    let (_, _, text) = health.condition().unwrap();
    assert!(text.contains("Denied: not this one"), "{text}");
    let since = Instant::now();
    let second = task.waits().await;
    assert_ne!(first, second);
    assert!(since.elapsed() >= Duration::from_mins(9), "not at once");
}

#[tokio::test(start_paused = true)]
async fn a_certificate_for_other_names_is_not_used() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    let issuer = Issuer::Authority(authority.clone());
    let mut task = Running::start(wanted(Purpose::Client, &[]), folder.path(), issuer, began).await;
    let name = task.waits().await;
    let other = crate::certs::request::request(
        &wanted(Purpose::Client, &["10.0.0.9"]),
        &crate::certs::request::key().unwrap(),
    );
    let foreign = authority.sign(&other.unwrap().pem, Duration::from_hours(1));
    authority.answer(&name, Answer::Issued(foreign));
    let failing = |health: &Health| matches!(health, Health::Failing { .. });
    let health = task.until("failing", failing).await;
    assert!(
        format!("{health:?}").contains("the key does not belong to the certificate"),
        "{health:?}"
    );
    assert!(task.pair().is_none());
}

#[tokio::test(start_paused = true)]
async fn while_the_authority_is_away_the_old_one_stays_and_it_is_asked_less_often() {
    let (folder, began) = (folder(), Instant::now());
    let authority = FakeAuthority::new();
    authority.with(|state| state.approve_all = true);
    let issuer = Issuer::Authority(authority.clone());
    let mut task = Running::start(wanted(Purpose::Client, &[]), folder.path(), issuer, began).await;
    task.valid().await;
    let old = task.pair().unwrap();
    authority.with(|state| state.down = true);
    let failing = |health: &Health| matches!(health, Health::Failing { .. });
    task.until("failing", failing).await;
    authority.with(|state| state.looks = 0);
    tokio::time::sleep(Duration::from_hours(1)).await;
    let looks = authority.state.lock().unwrap().looks;
    assert!((10..40).contains(&looks), "{looks} in an hour");
    assert_eq!(task.pair().unwrap(), old);
    authority.with(|state| state.down = false);
    task.valid().await;
    assert_ne!(task.pair().unwrap(), old);
}

#[tokio::test(start_paused = true)]
async fn a_certificate_that_could_not_be_stored_is_not_used() {
    let (folder, began) = (folder(), Instant::now());
    let missing = folder.path().join("later");
    let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
    let mut task = Running::start(wanted, &missing, Issuer::SelfSigned, began).await;
    let failing = |health: &Health| matches!(health, Health::Failing { .. });
    let health = task.until("failing", failing).await;
    assert!(format!("{health:?}").contains("later"), "{health:?}");
    let provisional = task.pair().unwrap();
    std::fs::create_dir(&missing).unwrap();
    task.valid().await;
    assert_ne!(task.pair().unwrap(), provisional);
    assert!(missing.join("serving.pem").exists());
}

#[tokio::test(start_paused = true)]
async fn a_damaged_file_counts_as_none() {
    let (folder, began) = (folder(), Instant::now());
    let whole = {
        let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
        let mut task = Running::start(wanted, folder.path(), Issuer::SelfSigned, began).await;
        task.valid().await;
        task.pair().unwrap()
    };
    let other = crate::certs::request::key().unwrap();
    for text in [
        String::new(),
        whole.cert_pem.clone(),
        format!("{}{other}", whole.cert_pem),
    ] {
        let path = folder.path().join("serving.pem");
        std::fs::File::create(&path)
            .and_then(|mut file| std::io::Write::write_all(&mut file, text.as_bytes()))
            .unwrap();
        let wanted = wanted(Purpose::Serving, &["10.0.0.7"]);
        let mut task = Running::start(wanted, folder.path(), Issuer::SelfSigned, began).await;
        task.valid().await;
        assert_ne!(task.pair().unwrap(), whole);
    }
}
