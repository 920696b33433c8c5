//! PURE: the lines of one rank, from the log of a container of several ranks. Each line begins with the number of its rank
//! (`3: `, with blanks before it that align the numbers); srun writes that, or the lines are its own and have no number.

/// The longest label: blanks, a number and `: `. What is longer is none.
const LABEL: usize = 16;

#[derive(Debug, PartialEq, Eq)]
enum State {
    /// The beginning of a line, of which this much is known.
    Label(Vec<u8>),
    /// The rest of a line of the rank.
    Own,
    /// The rest of another line.
    Foreign,
}

/// Lets the lines of one rank through, without their labels.
#[derive(Debug)]
pub(super) struct OneRank {
    rank: u32,
    state: State,
}

impl OneRank {
    pub(super) fn new(rank: u32) -> Self {
        Self {
            rank,
            state: State::Label(Vec::new()),
        }
    }

    /// What of the next piece of the log belongs to the rank. Lines may be cut anywhere.
    pub(super) fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut own = Vec::new();
        for byte in bytes {
            match &mut self.state {
                State::Own => own.push(*byte),
                State::Foreign => {}
                State::Label(label) => {
                    label.push(*byte);
                    match number(label) {
                        Label::Incomplete => {}
                        Label::Of(rank) if rank == self.rank => self.state = State::Own,
                        Label::Of(_) | Label::None => self.state = State::Foreign,
                    }
                }
            }
            if *byte == b'\n' {
                self.state = State::Label(Vec::new());
            }
        }
        own
    }
}

#[derive(Debug, PartialEq, Eq)]
enum Label {
    Incomplete,
    Of(u32),
    None,
}

/// The number with which a line begins.
fn number(label: &[u8]) -> Label {
    let text = label.trim_ascii_start();
    let digits = text.iter().take_while(|byte| byte.is_ascii_digit()).count();
    let (number, rest) = text.split_at(digits);
    match rest {
        b"" | b":" if label.len() < LABEL && (digits > 0 || rest.is_empty()) => Label::Incomplete,
        b": " => std::str::from_utf8(number)
            .ok()
            .and_then(|number| number.parse().ok())
            .map_or(Label::None, Label::Of),
        _ => Label::None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &[u8] =
        b" 3: one\n13: two\n 3: \nsrun: error: x\n 3: 3: four\n\n: \n3x: no\n 3: end";

    #[test]
    fn the_lines_of_one_rank_come_without_their_labels() {
        let of = |rank| {
            let own = OneRank::new(rank).take(LOG);
            String::from_utf8(own).unwrap()
        };
        assert_eq!(of(3), "one\n\n3: four\nend");
        assert_eq!(of(13), "two\n");
        assert_eq!(of(1), "");
    }

    #[test]
    fn pieces_may_be_cut_anywhere() {
        for size in 1..LOG.len() {
            let mut rank = OneRank::new(3);
            let own: Vec<u8> = LOG
                .chunks(size)
                .flat_map(|piece| rank.take(piece))
                .collect();
            assert_eq!(own, b"one\n\n3: four\nend", "{size}");
        }
    }

    #[test]
    fn a_long_line_without_a_label_needs_no_memory() {
        let mut rank = OneRank::new(0);
        assert!(rank.take(&b"1".repeat(1 << 16)).is_empty());
        assert_eq!(rank.state, State::Foreign);
        let mut rank = OneRank::new(0);
        assert!(rank.take(&b" ".repeat(1 << 16)).is_empty());
        assert_eq!(rank.state, State::Foreign);
    }
}
