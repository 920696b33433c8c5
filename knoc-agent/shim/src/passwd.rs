//! What the image's own `/etc/passwd` and `/etc/group` say about the user that a program is to be. They are read from the container
//! once it is set up, and only if they are needed: for names, and if the container's file may differ in what matters (see
//! [`account`]).

use std::{process::Stdio, time::Duration};

use knoc_contract::launch::LaunchSpec;
use knoc_proto::pb;
use tokio_util::sync::CancellationToken;

use super::{
    inside::{self, Place, Question},
    pod::Pod,
};
use crate::launch::{account, enter};

/// How long the helper may take: the image may lie on a file system that hangs.
const WAIT: Duration = Duration::from_secs(5);

/// A user or a group that the image names and does not have. The words are those of other runtimes.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "unable to find {what} {name:?} of the image {image:?}: no matching entries in {file} file; set runAsUser and runAsGroup to \
     numbers, or use an image whose /etc/{file} has it"
)]
pub(crate) struct UnknownName {
    what: &'static str,
    name: String,
    image: String,
    file: &'static str,
}

/// What the image's own files say.
#[derive(Debug, Default)]
pub(crate) struct Account {
    /// The text of `/etc/passwd`, if the launcher needs it. `None` also if it cannot be read, as in a container that root has
    /// set up.
    pub(crate) passwd: Option<Vec<u8>>,
    /// The number of the group, if the image names one.
    pub(crate) gid: Option<u32>,
}

/// Reads what `spec` needs. A name is not looked for if the file cannot be read.
pub(crate) async fn of_image(
    pod: &Pod,
    place: Place,
    (spec, container): (&LaunchSpec, &pb::Container),
    abort: &CancellationToken,
) -> Result<Account, UnknownName> {
    let Some(user) = spec.user.as_ref().filter(|_| spec.settle) else {
        return Ok(Account::default());
    };
    let [name, group] = account::names(user);
    let mut passwd = None;
    if account::may_be_overwritten(user) {
        passwd = read(pod, place, enter::PASSWD, abort).await;
    }
    let image = &container.image;
    look_up(image, enter::PASSWD, name, passwd.as_deref())?;
    let mut groups = None;
    let group = group.filter(|_| container.run_as_group.is_none());
    if group.is_some() {
        groups = read(pod, place, enter::GROUP, abort).await;
    }
    let gid = look_up(image, enter::GROUP, group, groups.as_deref())?;
    let passwd = passwd.filter(|text| !text.is_empty());
    Ok(Account { passwd, gid })
}

/// PURE: the number of the name in the text of the file, if both are known.
fn look_up(
    image: &str,
    file: &'static str,
    name: Option<&[u8]>,
    text: Option<&[u8]>,
) -> Result<Option<u32>, UnknownName> {
    let (Some(name), Some(text)) = (name, text) else {
        return Ok(None);
    };
    let number = account::named(text, name).ok_or_else(|| UnknownName {
        what: if file == enter::PASSWD {
            "user"
        } else {
            "group"
        },
        name: String::from_utf8_lossy(name).into_owned(),
        image: image.to_owned(),
        file,
    });
    number.map(Some)
}

/// The text of the image's own file, empty if it has none. `None` if it cannot be read.
async fn read(
    pod: &Pod,
    place: Place,
    file: &'static str,
    abort: &CancellationToken,
) -> Option<Vec<u8>> {
    let question = Question {
        mode: file,
        request: &[],
        wait: WAIT,
        output: Stdio::null(),
    };
    match inside::ask(pod, place, question, abort).await {
        Ok(text) => Some(text),
        Err(error) => {
            tracing::warn!(%error, file, "cannot read the image's own file in /etc; names in it are not known");
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_the_image_lacks_is_an_error_that_names_both() {
        let of = |file, name: Option<&'static str>, text: Option<&'static str>| {
            let (name, text) = (name.map(str::as_bytes), text.map(str::as_bytes));
            look_up("reg/app:1", file, name, text).map_err(|error| error.to_string())
        };
        let passwd = "app:x:1000:100::/:\n";
        assert_eq!(of(enter::PASSWD, Some("app"), Some(passwd)), Ok(Some(1000)));
        assert_eq!(of(enter::GROUP, Some("app"), Some("app:x:7:")), Ok(Some(7)));
        // Nothing is named, or the file cannot be read.
        assert_eq!(of(enter::PASSWD, None, Some(passwd)), Ok(None));
        assert_eq!(of(enter::PASSWD, Some("app"), None), Ok(None));
        let why = of(enter::PASSWD, Some("ghost"), Some(passwd)).unwrap_err();
        let wanted = "unable to find user \"ghost\" of the image \"reg/app:1\": no matching entries in passwd file; ";
        assert!(why.starts_with(wanted), "{why}");
        // An image without the file has no names.
        let why = of(enter::GROUP, Some("staff"), Some("")).unwrap_err();
        let wanted = "unable to find group \"staff\" of the image \"reg/app:1\": no matching entries in group file; ";
        assert!(why.starts_with(wanted), "{why}");
    }
}
