//! docs/conformance.md: a table for each list, with a row for each of its tests. A run writes the rows of the tests that it ran and
//! leaves the others, so that a list can be run in parts.

use std::{collections::BTreeMap, fmt::Write as _, path::Path};

use anyhow::Context as _;

use super::List;

/// What a test did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Row {
    pub(super) passed: bool,
    pub(super) seconds: u64,
    /// The podIP policy that it ran with.
    pub(super) policy: String,
    /// Why it failed.
    pub(super) reason: String,
}

/// The page.
#[derive(Debug)]
pub(super) struct Page {
    /// Of the tests of this run.
    pub(super) policy: String,
    /// Of the last run.
    pub(super) date: String,
    lists: Vec<List>,
    rows: BTreeMap<(String, String), Row>,
}

const HEAD: &str = "\
# Conformance

Written by `make conformance`, which runs the end-to-end suite of Kubernetes 1.36 unchanged against the test bed: real Kubernetes,
Slurm and Apptainer. `tests/conformance` has the lists: A are the conformance and node-conformance tests that need one node, no Service
network and no privilege; B are those that need Services, pod addresses that others reach, or the user ids that pods ask for. Each
test is a process of its own, several at once; those marked `[Serial]` or `[Disruptive]` run alone. A test passes if the suite says so. A test
that fails has the first reason that its log gives. The time includes the removal of the test's namespace and the time that the other tests
take from the machine. A run writes the rows of the tests that it ran, so rows can be from earlier runs and earlier versions of KNoC. The
column podIP has the policy of the run: `none`, where the relay leads from Services to pods, `node` if pods have the address of their compute
node as `status.podIP`, or `own` if they have addresses of their own. During a run one compute node takes jobs, and a processor comes with 256 MB. The tests that create Endpoints
and EndpointSlices need pods with different addresses: they run with `NODES=exclusive`, where each pod has a compute node of its own.

`make test` runs a part of list A with every change, `tests/conformance/ci.txt`, and does not write this page: what most pods use, without tests that run
alone or take minutes.

No single policy serves all of list B, so it runs twice: first with `KNOC_NODE_POD_IP=own KNOC_NODE_POD_RANGE=10.200.0.0/16`, where pods reach
pods, and the API server reaches pods at their own addresses, because the kubelet listens there (`node.podListeners`); and then what failed
(`ONLY=failed`) with `KNOC_NODE_POD_IP=none`, where the API server reaches webhooks in pods through Services with the relay.

Two tests of list B fail:

- \"Proxy version v1 should proxy through a service and a pod\" connects to ports of a pod that neither its containers declare nor Services name (443
  and 1080, among others). The kubelet listens at the pod's address only on ports that somebody names
  ([ADR 0139](adr/0139-the-kubelet-listens-at-the-addresses-of-pods.md)); other pods of the node reach all of them.
- EmptyDir with a `subPath` and FSGroup wants a folder that belongs to user 0 while the program is user 1001, with the setgid and sticky bits of a
  tmpfs that root has mounted. An ordinary user has one user id in a pod, so the folder belongs to user 1001 there
  ([ADR 0135](adr/0135-programs-see-themselves-as-the-user-that-the-pod-asks-for.md)); its group is the wanted one, and its mode has neither bit.
";

impl Page {
    /// The page, with the rows that are still in a list; without the file, an empty one. Lists of the page that are not given stay.
    pub(super) fn read(path: &Path, lists: &[List]) -> anyhow::Result<Self> {
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(error) => return Err(error).with_context(|| path.display().to_string()),
        };
        Ok(parse(&text, lists))
    }

    /// What the page says of a test.
    pub(super) fn result(&self, list: &str, test: &str) -> Option<&Row> {
        self.rows.get(&(list.to_owned(), test.to_owned()))
    }

    /// What a test did now.
    pub(super) fn set(&mut self, list: &str, test: &str, row: Row) {
        self.rows.insert((list.to_owned(), test.to_owned()), row);
    }

    /// Writes the page.
    pub(super) fn write(&self, path: &Path) -> anyhow::Result<()> {
        #[expect(clippy::disallowed_methods, reason = "a page of the documentation")]
        std::fs::write(path, self.render()?).with_context(|| path.display().to_string())
    }

    fn render(&self) -> anyhow::Result<String> {
        let mut page = HEAD.to_owned();
        writeln!(page, "\nThe last run was on {}.", self.date)?;
        for list in &self.lists {
            let rows = list.tests.iter();
            let rows = rows.filter_map(|test| Some((test, self.result(&list.name, test)?)));
            let rows: Vec<_> = rows.collect();
            let passed = rows.iter().filter(|(_, row)| row.passed).count();
            writeln!(
                page,
                "\n## List {}\n\n{passed} of {} tests passed, {} have not run.\n",
                list.name,
                list.tests.len(),
                list.tests.len() - rows.len()
            )?;
            writeln!(
                page,
                "| result | seconds | podIP | test | reason |\n|---|---|---|---|---|"
            )?;
            for (test, row) in rows {
                let word = if row.passed { "passed" } else { "**failed**" };
                let (seconds, policy, reason) = (row.seconds, cell(&row.policy), cell(&row.reason));
                let test = cell(test);
                writeln!(
                    page,
                    "| {word} | {seconds} | {policy} | {test} | {reason} |"
                )?;
            }
        }
        Ok(page)
    }
}

/// A text as a cell of a table: one line, without the table's and HTML's own characters.
fn cell(text: &str) -> String {
    let mut cell = String::new();
    for c in text.chars() {
        match c {
            '|' => cell.push_str("&#124;"),
            '<' => cell.push_str("&lt;"),
            '\\' | '*' | '_' | '`' => cell.extend(['\\', c]),
            c if c.is_control() => cell.push(' '),
            c => cell.push(c),
        }
    }
    cell
}

/// The text of a cell.
fn uncell(cell: &str) -> String {
    let mut text = String::new();
    let mut chars = cell.chars();
    while let Some(c) = chars.next() {
        text.push(if c == '\\' {
            chars.next().unwrap_or(c)
        } else {
            c
        });
    }
    text.replace("&#124;", "|").replace("&lt;", "<")
}

fn parse(text: &str, lists: &[List]) -> Page {
    let mut page = Page {
        policy: String::new(),
        date: String::new(),
        lists: lists.to_vec(),
        rows: BTreeMap::new(),
    };
    let mut list = String::new();
    for line in text.lines() {
        if let Some(name) = line.strip_prefix("## List ") {
            name.clone_into(&mut list);
            if lists.iter().all(|known| known.name != name) {
                page.lists.push(List {
                    name: name.to_owned(),
                    tests: Vec::new(),
                });
            }
            continue;
        }
        let Some((name, row)) = parse_row(line) else {
            continue;
        };
        // A list that is not given has the tests of its rows.
        if lists.iter().all(|known| known.name != list)
            && let Some(other) = page.lists.iter_mut().find(|other| other.name == list)
        {
            other.tests.push(name.clone());
        }
        page.set(&list, &name, row);
    }
    page.lists.sort_by(|left, right| left.name.cmp(&right.name));
    page
}

fn parse_row(line: &str) -> Option<(String, Row)> {
    let cells = line.strip_prefix("| ")?.strip_suffix(" |")?;
    let mut cells = cells.splitn(5, " | ");
    let passed = match cells.next()? {
        "passed" => true,
        "**failed**" => false,
        _ => return None,
    };
    let seconds = cells.next()?.parse().ok()?;
    let policy = uncell(cells.next()?);
    let test = uncell(cells.next()?);
    let reason = uncell(cells.next()?.trim());
    Some((
        test,
        Row {
            passed,
            seconds,
            policy,
            reason,
        },
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(name: &str, tests: &[&str]) -> List {
        List {
            name: name.to_owned(),
            tests: tests.iter().map(|test| (*test).to_owned()).collect(),
        }
    }

    fn row(passed: bool, reason: &str) -> Row {
        Row {
            passed,
            seconds: 7,
            policy: "node".to_owned(),
            reason: reason.to_owned(),
        }
    }

    #[test]
    fn a_run_keeps_the_rows_of_tests_that_it_did_not_run() -> anyhow::Result<()> {
        let lists = [list("A", &["[x] one_a", "[x] two | $(B)*", "[x] three"])];
        let mut page = parse("", &lists);
        "2026-01-02".clone_into(&mut page.date);
        page.set("A", "[x] one_a", row(true, ""));
        page.set("A", "[x] two | $(B)*", row(false, "a | <b> `c` \\d"));
        let text = page.render()?;
        assert!(
            text.contains("1 of 3 tests passed, 1 have not run."),
            "{text}"
        );
        assert!(
            text.contains("| passed | 7 | node | [x] one\\_a |"),
            "{text}"
        );
        let again = parse(&text, &lists);
        assert_eq!(again.rows, page.rows, "{text}");
        assert_eq!(again.result("A", "[x] three"), None);
        Ok(())
    }

    #[test]
    fn a_test_that_is_no_longer_in_the_list_has_no_row() -> anyhow::Result<()> {
        let mut page = parse("", &[list("A", &["[x] old", "[x] new"])]);
        page.set("A", "[x] old", row(true, ""));
        let text = page.render()?;
        let text = parse(&text, &[list("A", &["[x] new"])]).render()?;
        assert!(
            text.contains("0 of 1 tests passed, 1 have not run."),
            "{text}"
        );
        assert!(!text.contains("[x] old"), "{text}");
        Ok(())
    }

    #[test]
    fn a_list_that_does_not_run_stays_on_the_page() -> anyhow::Result<()> {
        let mut page = parse("", &[list("B", &["[x] of b", "[x] not run"])]);
        page.set("B", "[x] of b", row(false, "why"));
        let text = page.render()?;
        let mut page = parse(&text, &[list("A", &["[x] of a"])]);
        page.set("A", "[x] of a", row(true, ""));
        let text = page.render()?;
        let (a, b) = text.split_once("## List B").context("no list B")?;
        assert!(a.contains("| passed | 7 | node | [x] of a |"), "{text}");
        assert!(
            b.contains("| **failed** | 7 | node | [x] of b | why |"),
            "{text}"
        );
        Ok(())
    }
}
