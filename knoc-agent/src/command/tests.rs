use super::*;

fn sh(script: &str) -> Command {
    Command::new("/bin/sh")
        .arg("-c")
        .arg(script)
        .env("PATH", "/usr/bin:/bin")
}

#[tokio::test]
async fn output_stdin_and_environment_are_exactly_what_was_given() {
    let out = sh("cat; env")
        .stdin("in\n")
        .env("A", "b c")
        .run()
        .await
        .unwrap();
    let text = out.text();
    assert!(text.starts_with("in\n"), "{text}");
    assert!(text.contains("A=b c\n"), "{text}");
    assert!(!text.contains("CARGO"), "nothing is inherited: {text}");
}

#[tokio::test]
async fn a_failure_keeps_code_signal_and_message() {
    let err = sh("echo o; echo sbatch: error: no >&2; exit 7")
        .run()
        .await
        .unwrap_err();
    assert_eq!(err.message(), Some("sbatch: error: no"));
    assert!(
        matches!(err.kind, CommandErrorKind::Exit { code: Some(7), .. }),
        "{err:?}"
    );
    let err = sh("kill -9 $$").run().await.unwrap_err();
    assert!(
        matches!(
            err.kind,
            CommandErrorKind::Exit {
                signal: Some(9),
                ..
            }
        ),
        "{err:?}"
    );
    let err = Command::new("/nowhere/sbatch").run().await.unwrap_err();
    assert_eq!(
        err.to_string(),
        "/nowhere/sbatch does not exist or is not executable"
    );
}

#[tokio::test]
async fn the_deadline_kills_the_whole_group() {
    let dir = tempfile::tempdir().unwrap();
    let pid_file = dir.path().join("pid");
    let script = format!(
        "sleep 600 & echo $! >'{}'; echo slow >&2; wait",
        pid_file.display()
    );
    let begin = Instant::now();
    let err = sh(&script)
        .deadline(Duration::from_millis(500))
        .run()
        .await
        .unwrap_err();
    assert!(begin.elapsed() < Duration::from_mins(2));
    assert!(
        matches!(&err.kind, CommandErrorKind::Timeout { .. }),
        "{err:?}"
    );
    assert_eq!(err.message(), Some("slow"));
    let pid = std::fs::read_to_string(pid_file).unwrap().trim().to_owned();
    for _ in 0..200 {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        if stat.is_empty() || stat.contains(") Z ") {
            return;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    unreachable!("{pid} is still alive");
}

#[tokio::test]
async fn output_is_bounded_and_still_drained() {
    let out = sh("yes | head -c 1000000")
        .capture(1000)
        .run()
        .await
        .unwrap();
    assert_eq!(out.stdout.len(), 1000);
    assert!(out.truncated);
}

#[tokio::test]
async fn unread_stdin_is_not_a_failure() {
    sh("exit 0").stdin(vec![b'x'; 1 << 20]).run().await.unwrap();
}
