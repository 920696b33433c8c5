use super::*;

fn parsed(arguments: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from(["knocctl"].iter().chain(arguments))
}

#[test]
fn the_definition_of_the_command_line_is_consistent() {
    command().debug_assert();
}

#[test]
fn global_options_stand_anywhere() {
    for arguments in [
        &["-o", "json", "--context", "a", "pods"][..],
        &["pods", "--context", "a", "-o", "json"],
    ] {
        let cli = parsed(arguments).unwrap();
        assert_eq!(cli.global.output, output::Format::Json);
        assert_eq!(cli.global.context.as_deref(), Some("a"));
    }
}

#[test]
fn mistakes_end_with_2_and_help_with_0() {
    let code = |arguments: &[&str]| parsed(arguments).unwrap_err().exit_code();
    assert_eq!(code(&["--help"]), 0);
    assert_eq!(code(&["pods", "-o", "xml"]), 2);
    assert_eq!(code(&["nonsense"]), 2);
    assert_eq!(code(&["run"]), 2);
    assert_eq!(code(&["delete"]), 2);
    assert_eq!(code(&["delete", "x", "--now", "--grace-period", "3"]), 2);
}

#[test]
fn completions_for_every_shell() {
    for shell in ["bash", "zsh", "fish"] {
        parsed(&["completions", shell]).unwrap();
    }
}
