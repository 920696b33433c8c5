//! The table of docs/guide/charts.md. A run writes the rows of its charts and leaves the others.

use std::{
    path::Path,
    sync::{Mutex, PoisonError},
};

use anyhow::Context as _;

use super::Chart;

/// The variable with the path of the page. If it is not set, nothing is written.
const PAGE: &str = "KNOC_CHARTS_PAGE";
/// The lines around what is written.
const BEGIN: &str = "<!-- Written by `make charts`: -->";
const END: &str = "<!-- until here. -->";
/// The titles of the table.
const TITLES: &str = "| manifest | pods as of | program | what is done | result | seconds |\n|---|---|---|---|---|---|";

/// A lock, because tests that run at the same time write rows.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Writes the row of the chart.
pub(super) fn write(server: &str, chart: &Chart, works: bool, seconds: u64) -> anyhow::Result<()> {
    let Some(page) = std::env::var_os(PAGE) else {
        return Ok(());
    };
    let page = Path::new(&page);
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let old = std::fs::read_to_string(page).with_context(|| page.display().to_string())?;
    let date = jiff::Timestamp::now().strftime("%Y-%m-%d");
    let said = format!(
        "Run on {date} on Kubernetes {server}, Slurm and Apptainer; the seconds are from the first object to the last pod's end."
    );
    let new = with_row(&old, &said, &head(chart), &cells(chart, works, seconds))?;
    crate::site::write(page, &new).with_context(|| page.display().to_string())
}

/// PURE: the first cell of the chart's row.
fn head(chart: &Chart) -> String {
    format!("| [{0}](../../tests/charts/{0}.yaml) |", chart.name)
}

/// PURE: the other cells of the chart's row.
fn cells(chart: &Chart, works: bool, seconds: u64) -> String {
    let result = if works { "works" } else { "**fails**" };
    let Chart {
        form,
        program,
        asked,
        ..
    } = chart;
    format!(" {form} | {program} | {asked} | {result} | {seconds} |")
}

/// PURE: the page with the row in place of an older one. Rows are sorted by their charts.
fn with_row(page: &str, said: &str, head: &str, cells: &str) -> anyhow::Result<String> {
    let (before, rest) = page.split_once(BEGIN).context("the page has no table")?;
    let (table, after) = rest.split_once(END).context("the table has no end")?;
    let others = table
        .lines()
        .filter(|line| line.starts_with("| [") && !line.starts_with(head));
    let mut rows: Vec<String> = others.map(str::to_owned).collect();
    rows.push(format!("{head}{cells}"));
    rows.sort();
    let rows = rows.join("\n");
    Ok(format!(
        "{before}{BEGIN}\n\n{said}\n\n{TITLES}\n{rows}\n\n{END}{after}"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_replaces_its_own_and_leaves_the_others() -> anyhow::Result<()> {
        let page = format!("# Charts\n\n{BEGIN}\n\n{END}\n\nMore.\n");
        let page = with_row(&page, "first", "| [b](b.yaml) |", " works | 7 |")?;
        let page = with_row(&page, "second", "| [a](a.yaml) |", " works | 8 |")?;
        let page = with_row(&page, "third", "| [b](b.yaml) |", " **fails** | 9 |")?;
        let rows = "| [a](a.yaml) | works | 8 |\n| [b](b.yaml) | **fails** | 9 |";
        let table = format!("{BEGIN}\n\nthird\n\n{TITLES}\n{rows}\n\n{END}");
        assert_eq!(page, format!("# Charts\n\n{table}\n\nMore.\n"));
        Ok(())
    }
}
