//! Finds the known name that a mistyped one was probably meant to be.

/// The known name that is most similar to `name`, if one is similar enough: for every three letters it may differ by
/// one letter that is added, missing or changed, or by two that are swapped.
pub(super) fn nearest<'k>(name: &str, known: &[&'k str]) -> Option<&'k str> {
    let lower = name.to_lowercase();
    let distance = |known: &str| strsim::damerau_levenshtein(&lower, &known.to_lowercase());
    let (least, nearest) = known
        .iter()
        .map(|known| (distance(known), *known))
        .min_by_key(|(distance, _)| *distance)?;
    (least <= name.chars().count().div_ceil(3)).then_some(nearest)
}
