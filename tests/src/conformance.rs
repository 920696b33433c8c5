//! The upstream conformance suite against the running stack: each test of a list in a process of its own, several at once, and those
//! that must be alone on the node one after the other at the end. The results are in docs/conformance.md.

mod bed;
mod outcome;
mod page;

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use tokio::task::JoinSet;

use crate::Run;

use self::outcome::Outcome;
use self::page::{Page, Row};

/// What is added to a test's own limit before its process is killed: the suite removes the test's namespace first.
const GRACE: Duration = Duration::from_mins(2);
/// How much longer tests may take that the suite calls slow.
const SLOW: u32 = 3;

/// What to run, and how.
#[derive(Debug)]
pub struct Options {
    /// The lists, each with its name.
    pub lists: Vec<List>,
    /// Only tests whose names contain one of these; empty: all.
    pub focus: Vec<String>,
    /// Only tests with this result on the page.
    pub only: Only,
    /// Tests at once.
    pub side: usize,
    /// The time that one test may take; slow ones may take three times as long.
    pub limit: Duration,
    /// After this time no further test is started.
    pub budget: Option<Duration>,
    /// The page.
    pub page: PathBuf,
    /// The folder of the test logs.
    pub logs: PathBuf,
}

impl Options {
    /// Is no further test to be started?
    fn is_over(&self, began: Instant) -> bool {
        self.budget.is_some_and(|budget| began.elapsed() >= budget)
    }
}

/// Selects tests by what the page says of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Only {
    /// All tests.
    All,
    /// Those that did not pass.
    Failed,
    /// Those that have not run.
    New,
}

/// The names of a list.
#[derive(Clone, Debug)]
pub struct List {
    /// `A`, or the name of a file.
    pub name: String,
    /// Names of tests, as the suite prints them.
    pub tests: Vec<String>,
}

impl List {
    /// Reads a list: a name on each line; `#` begins a comment.
    pub fn read(path: &Path) -> anyhow::Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        Ok(Self {
            name: name.into_owned(),
            tests: tests(&text),
        })
    }
}

fn tests(text: &str) -> Vec<String> {
    let lines = text.lines().map(str::trim);
    let names = lines.filter(|line| !line.is_empty() && !line.starts_with('#'));
    names.map(str::to_owned).collect()
}

/// A test that is to run.
#[derive(Clone, Debug)]
struct Test {
    list: String,
    name: String,
    number: usize,
}

impl Test {
    /// Whether nothing else may be on the node.
    fn is_alone(&self) -> bool {
        self.name.contains("[Serial]") || self.name.contains("[Disruptive]")
    }

    fn limit(&self, limit: Duration) -> Duration {
        if self.name.contains("[Slow]") {
            limit * SLOW
        } else {
            limit
        }
    }

    /// The suite's pattern for this test and no other.
    fn focus(&self) -> String {
        format!("(^| ){}$", escape(&self.name))
    }
}

/// The text as a regular expression of Go.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        if r"\.+*?()|[]{}^$".contains(c) {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

/// Which tests are to run, in the order of the lists.
fn chosen(options: &Options, page: &Page) -> Vec<Test> {
    let mut chosen = Vec::new();
    for list in &options.lists {
        for (number, name) in (1..).zip(&list.tests) {
            let focused =
                options.focus.is_empty() || options.focus.iter().any(|words| name.contains(words));
            let wanted = match (options.only, page.result(&list.name, name)) {
                (Only::All, _) | (Only::Failed | Only::New, None) => true,
                (Only::Failed, Some(row)) => !row.passed,
                (Only::New, Some(_)) => false,
            };
            if focused && wanted {
                chosen.push(Test {
                    list: list.name.clone(),
                    name: name.clone(),
                    number,
                });
            }
        }
    }
    chosen
}

/// Runs the tests and writes the page after each of them. Fails if one of the tests did not pass.
pub async fn run(options: &Options) -> anyhow::Result<()> {
    let mut page = Page::read(&options.page, &options.lists)?;
    let tests = chosen(options, &page);
    if tests.is_empty() {
        bail!("no test of the lists is selected");
    }
    std::fs::create_dir_all(&options.logs)?;
    page.policy = bed::pod_ip_policy().await?;
    page.date = jiff::Timestamp::now().strftime("%Y-%m-%d").to_string();
    let began = Instant::now();
    let (alone, together): (Vec<_>, Vec<_>) = tests.into_iter().partition(Test::is_alone);
    let mut counts = Counts {
        left: alone.len() + together.len(),
        ..Counts::default()
    };
    say(&format!(
        "{} tests, {} of them alone; podIP policy: {}",
        counts.left,
        alone.len(),
        page.policy
    ));
    batch(
        options,
        together,
        options.side,
        began,
        &mut page,
        &mut counts,
    )
    .await?;
    for test in alone {
        if options.is_over(began) {
            break;
        }
        // Their namespaces are removed after the tests have ended.
        bed::is_empty().await?;
        batch(options, vec![test], 1, began, &mut page, &mut counts).await?;
    }
    say(&format!(
        "{} passed, {} failed, {} not started, {} s",
        counts.passed,
        counts.failed,
        counts.left,
        began.elapsed().as_secs()
    ));
    if counts.failed > 0 {
        bail!(
            "{} tests failed, see {}",
            counts.failed,
            options.page.display()
        );
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Counts {
    passed: usize,
    failed: usize,
    left: usize,
}

async fn batch(
    options: &Options,
    tests: Vec<Test>,
    side: usize,
    began: Instant,
    page: &mut Page,
    counts: &mut Counts,
) -> anyhow::Result<()> {
    let mut tests = tests.into_iter();
    let mut running = JoinSet::new();
    loop {
        while running.len() < side
            && !options.is_over(began)
            && let Some(test) = tests.next()
        {
            let log = options
                .logs
                .join(format!("{}-{:03}.log", test.list, test.number));
            let limit = test.limit(options.limit);
            let policy = page.policy.clone();
            running.spawn(async move { (one(&test, policy, limit, &log).await, test) });
        }
        let Some(ended) = running.join_next().await else {
            return Ok(());
        };
        let (row, test) = ended?;
        let row = row.with_context(|| test.name.clone())?;
        counts.left -= 1;
        let word = if row.passed { "passed" } else { "FAILED" };
        say(&format!("{word} in {} s: {}", row.seconds, test.name));
        if row.passed {
            counts.passed += 1;
        } else {
            counts.failed += 1;
            say(&format!(
                "       {} ({}-{:03}.log)",
                row.reason, test.list, test.number
            ));
        }
        page.set(&test.list, &test.name, row);
        page.write(&options.page)?;
    }
}

/// Runs one test in a process of its own.
async fn one(test: &Test, policy: String, limit: Duration, log: &Path) -> anyhow::Result<Row> {
    let began = Instant::now();
    let command = Run::new("e2e.test")
        .arg(format!("--kubeconfig={}", bed::kubeconfig()?))
        .args(["--provider=skeleton", "--num-nodes=1", "--ginkgo.no-color"])
        .arg(format!("--ginkgo.focus={}", test.focus()))
        .arg(format!("--ginkgo.timeout={}s", limit.as_secs()))
        .deadline(limit + GRACE);
    let seconds = |began: Instant| began.elapsed().as_secs();
    let output = match command.output().await {
        Ok(output) => output,
        Err(error) => {
            return Ok(Row {
                passed: false,
                seconds: seconds(began),
                policy,
                reason: format!("{error:#}"),
            });
        }
    };
    let said = format!("{}\n{}", output.text(), output.stderr);
    #[expect(clippy::disallowed_methods, reason = "the log of a test")]
    std::fs::write(log, &said).with_context(|| log.display().to_string())?;
    let (passed, reason) = match outcome::of(output.code, &said) {
        Outcome::Passed => (true, String::new()),
        Outcome::Failed(reason) => (false, reason),
    };
    Ok(Row {
        passed,
        seconds: seconds(began),
        policy,
        reason,
    })
}

/// Prints the progress.
fn say(words: &str) {
    eprintln!("conformance: {words}");
}

#[cfg(test)]
mod unit {
    use super::*;

    fn test(name: &str) -> Test {
        Test {
            list: "A".to_owned(),
            name: name.to_owned(),
            number: 1,
        }
    }

    #[test]
    fn a_list_has_a_name_on_each_line() {
        assert_eq!(
            tests("# words\n\n[a] b\n  [c] d \n#[e] f\n"),
            ["[a] b", "[c] d"]
        );
    }

    #[test]
    fn what_make_test_runs_is_a_part_of_list_a_that_needs_no_node_for_itself() -> anyhow::Result<()>
    {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance");
        let all = List::read(&folder.join("A.txt"))?;
        let part = List::read(&folder.join("ci.txt"))?;
        assert!(part.tests.len() >= 60, "{}", part.tests.len());
        let mut rest = all.tests.iter();
        for name in &part.tests {
            assert!(
                rest.any(|known| known == name),
                "{name} is not in A.txt, or in another order"
            );
            assert!(!test(name).is_alone() && !name.contains("[Slow]"), "{name}");
        }
        Ok(())
    }

    #[test]
    fn a_pattern_selects_exactly_its_test() {
        assert_eq!(
            test("[sig-x] a (b) $(c) d.e [Slow]").focus(),
            r"(^| )\[sig-x\] a \(b\) \$\(c\) d\.e \[Slow\]$"
        );
    }

    #[test]
    fn serial_tests_are_alone_and_slow_ones_have_more_time() {
        let limit = Duration::from_secs(10);
        assert!(test("[sig-x] a [Serial] b").is_alone());
        assert!(test("[sig-x] a [Disruptive]").is_alone());
        assert!(!test("[sig-x] serial [Slow]").is_alone());
        assert_eq!(test("a [Slow]").limit(limit), limit * 3);
        assert_eq!(test("a").limit(limit), limit);
    }

    #[test]
    fn the_page_selects_what_has_not_run_or_has_failed() -> anyhow::Result<()> {
        let lists = vec![List {
            name: "A".to_owned(),
            tests: ["one", "two", "three"].map(str::to_owned).to_vec(),
        }];
        let folder = tempfile::tempdir()?;
        let mut page = Page::read(&folder.path().join("page.md"), &lists)?;
        for (name, passed) in [("one", true), ("two", false)] {
            let (policy, reason) = (String::new(), String::new());
            let seconds = 1;
            page.set(
                "A",
                name,
                Row {
                    passed,
                    seconds,
                    policy,
                    reason,
                },
            );
        }
        let mut options = Options {
            lists,
            focus: Vec::new(),
            only: Only::All,
            side: 1,
            limit: Duration::from_secs(1),
            budget: None,
            page: PathBuf::new(),
            logs: PathBuf::new(),
        };
        let names = |options: &Options| -> Vec<String> {
            let tests = chosen(options, &page);
            tests.into_iter().map(|test| test.name).collect()
        };
        assert_eq!(names(&options), ["one", "two", "three"]);
        options.only = Only::Failed;
        assert_eq!(names(&options), ["two", "three"]);
        options.only = Only::New;
        assert_eq!(names(&options), ["three"]);
        options.only = Only::All;
        options.focus = vec!["tw".to_owned(), "thr".to_owned()];
        assert_eq!(names(&options), ["two", "three"]);
        Ok(())
    }
}
