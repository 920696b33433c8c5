//! What must hold for any text as the `passwd` file of an image.

use super::{account, account_of, gid_of, lines, uid_of, with_own_line};

/// The HPC user.
const OWN: u32 = 1000;
/// As whom a program may see itself; few files have a line of this user.
const SHOWN: u32 = 4_000_000_000;

/// Reads any bytes as the user that an image names, in the first line, and its `passwd` file.
///
/// # Panics
/// If a field leads out of its line, or the file that is written for the container is not what was wanted.
pub(crate) fn passwd_file(data: &[u8]) {
    let end = data.iter().position(|byte| *byte == b'\n');
    let (user, passwd) = data.split_at(end.unwrap_or(data.len()));
    let passwd = passwd.get(1..).unwrap_or_default();
    let found = account(passwd, Some(user));
    let in_line = |field: &[u8]| !field.contains(&b'\n') && !field.contains(&b':');
    assert!(!found.home.is_empty() && in_line(&found.home) && in_line(&found.shell));
    if uid_of(passwd, user).is_none() {
        assert_eq!(found.home, b"/");
    }
    for ids in [None, Some([SHOWN, 7])] {
        let Some(text) = with_own_line(passwd, OWN, ids, &found) else {
            continue;
        };
        let shown = ids.map_or(OWN, |[uid, _]| uid);
        let written = account_of(&text, shown);
        assert_eq!(written.map(|it| it.home), Some(found.home.clone()));
        assert_eq!(lines(&text).count(), lines(passwd).count());
        if ids.is_some() {
            assert_eq!(gid_of(&text, Some(shown)), 7);
        }
    }
}
