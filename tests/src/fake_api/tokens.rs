//! Tokens of service accounts. They are invalid, each is another one, and they end with the time at which they expire.

use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::store::Target;

/// The tokens of a server.
#[derive(Debug, Default)]
pub(super) struct Tokens {
    /// How many seconds tokens live; if `None`, as long as their requests ask for.
    pub(super) life: Option<i64>,
    /// Those that were issued, oldest first.
    pub(super) issued: Vec<IssuedToken>,
}

/// A token that was issued.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IssuedToken {
    /// The token; after its last `-` it has the milliseconds of its expiry since 1970.
    pub token: String,
    /// When it expires.
    pub expires: Timestamp,
}

impl Tokens {
    /// The answer to a `TokenRequest`, with a new token.
    pub(super) fn answer(&mut self, target: &Target, body: &Value) -> Value {
        let asked = body["spec"]["expirationSeconds"].as_i64().unwrap_or(3600);
        let seconds = self.life.unwrap_or(asked);
        // Kubernetes has whole seconds.
        let expires = Timestamp::now().as_second() + seconds;
        let expires = Timestamp::UNIX_EPOCH + SignedDuration::from_secs(expires);
        let token = format!(
            "token-of-{}-{}-{}-until-{}",
            target.namespace,
            target.name,
            self.issued.len(),
            expires.as_millisecond()
        );
        let answer = json!({
            "kind": "TokenRequest", "apiVersion": "authentication.k8s.io/v1",
            "metadata": {}, "spec": body["spec"],
            "status": {"token": token, "expirationTimestamp": expires.to_string()},
        });
        self.issued.push(IssuedToken { token, expires });
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_is_another_one_and_says_when_it_expires() -> anyhow::Result<()> {
        let mut tokens = Tokens {
            life: Some(20),
            issued: Vec::new(),
        };
        let before = Timestamp::now().as_second();
        let body = json!({"spec": {"expirationSeconds": 3607}});
        for number in 0..2 {
            let answer = tokens.answer(&Target::default(), &body);
            let issued = &tokens.issued[number];
            assert_eq!(answer["status"]["token"], issued.token);
            let end = issued.token.rsplit('-').next().unwrap_or_default();
            assert_eq!(end.parse::<i64>()?, issued.expires.as_millisecond());
            assert!(issued.expires.as_second() - before >= 20, "{issued:?}");
        }
        assert_ne!(tokens.issued[0], tokens.issued[1]);
        Ok(())
    }
}
