//! docs/interop.md: a table for each API server version. A run writes its own rows and leaves the others.

use std::{
    fmt::Write as _,
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;

use super::clients::{Client, Verb};

/// The variable with the path of the page. If it is not set, no page is written.
const PAGE: &str = "KNOC_INTEROP_PAGE";

/// A lock, because tests that run at the same time write rows.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// The result of a client and a verb.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell {
    /// The client and the verb work.
    Works,
    /// They do not work; the test's error says how.
    Fails,
    /// The client does not support the verb, for this reason.
    Lacking(&'static str),
}

/// Writes the client's row into the table of the API server's version.
pub(super) fn write(server: &str, client: &Client, row: &[Cell]) -> anyhow::Result<()> {
    let Some(page) = std::env::var_os(PAGE) else {
        return Ok(());
    };
    let page = Path::new(&page);
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let old = std::fs::read_to_string(page).unwrap_or_default();
    let new = with_row(&old, server, client, row)?;
    crate::site::write(page, &new).with_context(|| page.display().to_string())
}

/// The page with the row inserted. Rows are sorted by name, and tables by version.
fn with_row(page: &str, server: &str, client: &Client, row: &[Cell]) -> anyhow::Result<String> {
    let mut tables = parse(page);
    if tables.iter().all(|(version, _)| version != server) {
        tables.push((server.to_owned(), Vec::new()));
        tables.sort_by(|left, right| right.0.cmp(&left.0));
    }
    let own = tables.iter_mut().find(|(version, _)| version == server);
    let (_, rows) = own.context("the table just added")?;
    let head = format!("| {} |", client.name);
    rows.retain(|old| !old.starts_with(&head));
    let mut line = format!("{head} {} |", client.transport);
    for cell in row {
        let text = match cell {
            Cell::Works => "yes".to_owned(),
            Cell::Fails => "**no**".to_owned(),
            Cell::Lacking(reason) => format!("– ({reason})"),
        };
        write!(line, " {text} |")?;
    }
    rows.push(line);
    rows.sort();
    render(&tables)
}

/// The rows of each version of the API server.
type Tables = Vec<(String, Vec<String>)>;

fn parse(page: &str) -> Tables {
    let mut tables = Tables::new();
    for line in page.lines() {
        if let Some(version) = line.strip_prefix("## Kubernetes ") {
            tables.push((version.to_owned(), Vec::new()));
        } else if let Some((_, rows)) = tables.last_mut()
            && line.starts_with("| ")
            && !line.starts_with("| client")
        {
            rows.push(line.to_owned());
        }
    }
    tables
}

fn render(tables: &Tables) -> anyhow::Result<String> {
    let mut text = format!(
        "# Clients\n\n\
         Written by `make interop`, {date}, with real programs: API server, KNoC, Slurm, Apptainer. Every client runs every verb \
         against its own pod; `tests/src/interop/check.rs` defines what \"yes\" means. A dash means that the client's library does \
         not support the verb, with the reason.\n",
        date = jiff::Timestamp::now().strftime("%Y-%m-%d"),
    );
    let titles = Verb::ALL.map(Verb::title).join(" | ");
    let rule = "|---".repeat(Verb::ALL.len() + 2);
    for (version, rows) in tables {
        let rows = rows.join("\n");
        writeln!(
            text,
            "\n## Kubernetes {version}\n\n| client | transport | {titles} |\n{rule}|\n{rows}"
        )?;
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_replaces_its_own_and_leaves_the_others() -> anyhow::Result<()> {
        let client = |name| Client::sample(name);
        let row = [Cell::Works; Verb::ALL.len()];
        let page = with_row("", "v1.34.4", &client("b"), &row)?;
        let page = with_row(&page, "v1.36.3", &client("b"), &row)?;
        let page = with_row(&page, "v1.36.3", &client("a"), &row)?;
        let mut failing = row;
        failing[1] = Cell::Fails;
        failing[2] = Cell::Lacking("it cannot");
        let page = with_row(&page, "v1.36.3", &client("b"), &failing)?;
        let found = parse(&page);
        let versions: Vec<_> = found.iter().map(|(version, _)| version.as_str()).collect();
        assert_eq!(versions, ["v1.36.3", "v1.34.4"]);
        assert_eq!(found[0].1.len(), 2);
        assert!(found[0].1[0].starts_with("| a |"));
        assert!(found[0].1[1].contains("| **no** | – (it cannot) |"));
        assert!(found[1].1[0].starts_with("| b |") && !found[1].1[0].contains("**no**"));
        Ok(())
    }
}
