//! The known name that a mistyped one was probably meant to be.

/// The known name that is most like `name`, if one is like it at all: a letter more, less or other, or two swapped,
/// for every three letters.
pub(super) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let lower = name.to_lowercase();
    let distance = |known: &str| strsim::damerau_levenshtein(&lower, &known.to_lowercase());
    let (least, nearest) = known
        .iter()
        .map(|known| (distance(known), *known))
        .min_by_key(|(distance, _)| *distance)?;
    (least <= name.chars().count().div_ceil(3)).then_some(nearest)
}
