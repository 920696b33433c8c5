//! The figures of other projects, from one run of them on a bed like this one. `make bench` does not repeat that run: what it
//! printed is here.

use std::fmt::Write as _;

use super::Figures;

/// What was run, when, and on what.
const RUN: &str = "\
interLink (virtual kubelet, API server and Slurm plugin; its version was not recorded) and Go KNoC (commit e1c17e3 of 2023-02-01, its \
last) were built and run before KNoC was written, not later than 2026-11-22 (the exact date was not recorded), on a bed like this one: \
Kubernetes 1.36.3, Slurm 24.11.5, Apptainer 1.4.5.";

/// The rows of the table: the figure, by hand, interLink, Go KNoC, and KNoC in the same run. Times are median / minimum / maximum in
/// milliseconds, or a median alone. A cell that begins with a number is also shown as a multiple of the row's figure by hand.
const ROWS: &[[&str; 5]] = &[
    [
        "1 pod: T1 created → job in the queue; by hand `sbatch`",
        "10",
        "74 / 36 / 268",
        "678 / 574 / 1117",
        "–",
    ],
    [
        "1 pod: T2 created → first line",
        "560",
        "837 / 415 / 1407",
        "1466 / 847 / 1741",
        "–",
    ],
    [
        "1 pod: T3 end of the program → final phase seen",
        "–",
        "6975 / 4033 / 10,024",
        "3455 / 141 / 5048",
        "–",
    ],
    [
        "50 at once: T2 created → first line; by hand 50 × `sbatch` alone",
        "≈ 1500",
        "3710 / 1591 / 8757",
        "10,507 / 3459 / 18,080",
        "–",
    ],
    [
        "50 at once: T3 end of the program → final phase seen",
        "–",
        "268,600 / 17,085 / 516,600",
        "4139 / 917 / 9684",
        "–",
    ],
    [
        "RPCs per minute to slurmctld at 50 running pods",
        "0",
        "36",
        "0 (never asks)",
        "–",
    ],
    [
        "resident memory at 50 pods",
        "–",
        "65 + 39 + 34 MB",
        "43 MB",
        "–",
    ],
    [
        "exec of `true`; by hand `apptainer exec instance://`",
        "78",
        "not implemented",
        "hangs",
        "–",
    ],
];

/// The section of the page.
pub(super) fn section(out: &mut String, figures: &Figures) -> anyhow::Result<()> {
    writeln!(
        out,
        "## Comparison with other projects\n\n\
         {RUN} That was another run than that of the other sections, so its milliseconds are compared only with its own floor, which \
         was measured in it: Slurm and Apptainer by hand. Each figure that has one is also given as a multiple of it. The \
         program sleeps 1 s, as above; median / minimum / maximum in milliseconds unless the row says otherwise. Differences below \
         300 ms are not significant, because slurmctld starts jobs once a second.\n\n\
         | | by hand | interLink | Go KNoC | KNoC, same run |\n|---|---|---|---|---|"
    )?;
    for [what, hand, others @ ..] in ROWS {
        write!(out, "| {what} | {hand} |")?;
        for figure in others {
            write!(out, " {} |", beside(hand, figure))?;
        }
        out.push('\n');
    }
    if let Some(one) = figures.batches.iter().find(|batch| batch.pods == 1) {
        writeln!(
            out,
            "\nKNoC in the run of the other sections, 1 pod: created → job in the queue {:.1} × `sbatch`, T2 {:.1} × by hand.",
            one.t2_before.median() / one.sbatch.median(),
            one.t2.median() / one.t2_hand.median(),
        )?;
    }
    writeln!(
        out,
        "\nTo repeat: `make bench` measures KNoC and its floors, but not the other projects (it starts the stack if it is not running)."
    )?;
    Ok(())
}

/// The figure, and how many times the figure by hand it is, if both are times.
fn beside(hand: &str, figure: &str) -> String {
    let ratio = median(figure).zip(median(hand));
    let ratio = ratio.map(|(figure, hand)| format!(" ({:.1} ×)", figure / hand));
    format!("{figure}{}", ratio.unwrap_or_default())
}

/// The number that the cell begins with; none if it is 0.
fn median(cell: &str) -> Option<f64> {
    let number = cell.split(' ').next()?.replace(',', "");
    number.parse().ok().filter(|number| *number > 0.0)
}

#[cfg(test)]
mod tests {
    use super::beside;

    #[test]
    fn times_are_shown_as_multiples_of_the_floor() {
        assert_eq!(
            beside("560", "1,400 / 415 / 1,407"),
            "1,400 / 415 / 1,407 (2.5 ×)"
        );
        for (hand, figure) in [
            ("–", "837 / 415 / 1407"),
            ("0", "36"),
            ("78", "hangs"),
            ("560", "> 300,000 / 17 / > 300,000"),
            ("≈ 1500", "3710 / 1591 / 8757"),
        ] {
            assert_eq!(beside(hand, figure), figure);
        }
    }
}
