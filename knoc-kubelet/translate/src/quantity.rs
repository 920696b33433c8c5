//! PURE: parses Kubernetes quantities (`100m`, `1.5Gi`, `2e3`) to whole thousandths, rounded up as by Kubernetes.

use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

/// The text is not a quantity. See <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a quantity")]
pub struct InvalidQuantity(pub String);

/// The quantity in thousandths (millicores for CPU), rounded up and limited to the range of `i64`.
pub fn millis(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    parse(&quantity.0).ok_or_else(|| InvalidQuantity(quantity.0.clone()))
}

/// The quantity in whole units (bytes for memory), rounded up and limited to the range of `i64`.
pub fn units(quantity: &Quantity) -> Result<i64, InvalidQuantity> {
    millis(quantity).map(|millis| ceil_div(millis, 1000))
}

/// Divides `a` by `b` and rounds up; `b` must be positive.
#[must_use]
pub fn ceil_div(a: i64, b: i64) -> i64 {
    let b = b.max(1);
    a.div_euclid(b) + i64::from(a.rem_euclid(b) != 0)
}

fn parse(text: &str) -> Option<i64> {
    let end = text
        .char_indices()
        .find(|(at, c)| !(c.is_ascii_digit() || *c == '.' || (*at == 0 && matches!(c, '+' | '-'))))
        .map_or(text.len(), |(at, _)| at);
    let (number, suffix) = text.split_at(end);
    let (digits, decimals) = digits(number)?;
    let (binary, decimal_power) = scale(suffix)?;
    // value × 1000 = digits × binary × 10^(power + 3 - decimals), rounded up.
    let power = decimal_power + 3 - decimals;
    let scaled = digits.checked_mul(binary)?;
    let value = if power >= 0 {
        scaled.checked_mul(10i128.checked_pow(u32::try_from(power).ok()?)?)?
    } else {
        let divisor = 10i128.checked_pow(u32::try_from(-power).ok()?)?;
        scaled.div_euclid(divisor) + i128::from(scaled.rem_euclid(divisor) != 0)
    };
    // Kubernetes too limits larger values to i64, which is as good as unlimited.
    Some(i64::try_from(value).unwrap_or(i64::MAX))
}

/// The digits of a decimal number as an integer, and the number of those after the decimal point.
fn digits(number: &str) -> Option<(i128, i32)> {
    let (negative, number) = match number.strip_prefix('-') {
        Some(rest) => (true, rest),
        None => (false, number.strip_prefix('+').unwrap_or(number)),
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() {
        return None;
    }
    let value: i128 = format!("0{whole}{fraction}").parse().ok()?;
    Some((
        if negative { -value } else { value },
        i32::try_from(fraction.len()).ok()?,
    ))
}

/// The factor of a suffix as a power of two and a power of ten.
fn scale(suffix: &str) -> Option<(i128, i32)> {
    Some(match suffix {
        "" => (1, 0),
        "n" => (1, -9),
        "u" => (1, -6),
        "m" => (1, -3),
        "k" => (1, 3),
        "M" => (1, 6),
        "G" => (1, 9),
        "T" => (1, 12),
        "P" => (1, 15),
        "E" => (1, 18),
        "Ki" => (1 << 10, 0),
        "Mi" => (1 << 20, 0),
        "Gi" => (1 << 30, 0),
        "Ti" => (1 << 40, 0),
        "Pi" => (1 << 50, 0),
        "Ei" => (1 << 60, 0),
        exponent => {
            let digits = exponent.strip_prefix(['e', 'E'])?;
            (
                1,
                digits
                    .parse()
                    .ok()
                    .filter(|power: &i32| power.abs() <= 18)?,
            )
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_of_every_form() {
        for (text, expected) in [
            ("1", 1000),
            ("100m", 100),
            ("0.5", 500),
            (".5", 500),
            ("1.0001", 1001),
            ("1n", 1),
            ("1Ki", 1_024_000),
            ("1.5Gi", 1_610_612_736_000),
            ("2e3", 2_000_000),
            ("2E", i64::MAX),
            ("3k", 3_000_000),
            ("-1", -1000),
            ("0", 0),
        ] {
            assert_eq!(millis(&Quantity(text.to_owned())), Ok(expected), "{text}");
        }
        for text in ["", "x", "1x", "1 Gi", "1.2.3", "e3", "--1"] {
            assert!(millis(&Quantity(text.to_owned())).is_err(), "{text}");
        }
    }

    #[test]
    fn division_rounds_up() {
        assert_eq!(ceil_div(1, 1000), 1);
        assert_eq!(ceil_div(2000, 1000), 2);
        assert_eq!(ceil_div(0, 5), 0);
    }
}
