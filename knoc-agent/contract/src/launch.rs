//! PURE encoding of the launch protocol. Both ends are the same binary, so there is no version in it.
//!
//! Shim to launcher: one [`LaunchSpec`], length-prefixed, with the stdio descriptors on its first byte. Launcher to
//! shim: any number of [`Reply`] messages; then end of file, which means that the program runs unless a
//! [`Reply::Failed`] came before.

/// A specification larger than this is refused: Linux bounds argv and environment far below.
pub const MAX_SPEC: usize = 16 << 20;
const MAX_REPLY: usize = 64 << 10;

/// The window of a terminal, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// What the launcher becomes, byte for byte.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchSpec {
    /// Program and arguments; the program is searched in the environment's `PATH`.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`, in order.
    pub env: Vec<Vec<u8>>,
    /// Working directory.
    pub cwd: Vec<u8>,
    /// Make the working directory where it is missing, as container runtimes do.
    pub create_cwd: bool,
    /// A terminal of this size instead of pipes: its master is sent back.
    pub tty: Option<Window>,
    /// Symbolic links to make, name and target in turn: for names under `/dev`, where nothing can be mounted.
    pub links: Vec<Vec<u8>>,
    /// Folders of the image that everybody may write to, made if they are missing.
    pub temporary: Vec<Vec<u8>>,
    /// Whose home the program has, in the form of an image's `User`; `None`: that of the user as whom it runs.
    pub user: Option<Vec<u8>>,
    /// The image's own `/etc/passwd`, where the container's may differ in what is said of the user.
    pub passwd: Option<Vec<u8>>,
    /// The container's `/etc/passwd`, which is the runtime's, is to say of the own user what it says of `user`.
    pub settle: bool,
}

/// What the launcher tells the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The program's pid, in the shim's PID namespace (sent by `enter`, which forks).
    Pid(u32),
    /// A descriptor is attached to this message: the terminal's master, or what `contain` was asked for.
    Master,
    /// The program cannot be started.
    Failed {
        /// The system's error number; 0: none.
        errno: i32,
        /// What was tried, in words.
        what: String,
    },
    /// `contain` cannot make its namespaces here.
    NoNamespaces {
        /// The system's error number.
        errno: i32,
        /// What was tried, in words.
        what: String,
    },
}

/// Bytes that are no message of this protocol.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum WireError {
    /// The message ends too early, or has bytes left over.
    #[error("malformed launch message")]
    Malformed,
    /// The message is too long.
    #[error("launch message of {0} bytes is too long")]
    TooLong(usize),
}

impl LaunchSpec {
    /// The bytes to send, length first.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut body = Vec::new();
        put_list(&mut body, &self.argv)?;
        put_list(&mut body, &self.env)?;
        put_bytes(&mut body, &self.cwd)?;
        body.push(u8::from(self.create_cwd));
        let window = self.tty.unwrap_or(Window { cols: 0, rows: 0 });
        body.push(u8::from(self.tty.is_some()));
        body.extend(window.cols.to_be_bytes());
        body.extend(window.rows.to_be_bytes());
        put_list(&mut body, &self.links)?;
        put_list(&mut body, &self.temporary)?;
        for optional in [&self.user, &self.passwd] {
            body.push(u8::from(optional.is_some()));
            put_bytes(&mut body, optional.as_deref().unwrap_or_default())?;
        }
        body.push(u8::from(self.settle));
        if body.len() > MAX_SPEC {
            return Err(WireError::TooLong(body.len()));
        }
        let mut message = Vec::with_capacity(body.len() + 4);
        put_bytes(&mut message, &body)?;
        Ok(message)
    }

    /// Reads the body, without the length.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut cursor = Cursor(body);
        let argv = cursor.list()?;
        let env = cursor.list()?;
        let cwd = cursor.bytes()?.to_vec();
        let create_cwd = cursor.byte()? != 0;
        let has_tty = cursor.byte()? != 0;
        let window = Window {
            cols: u16::from_be_bytes(cursor.array()?),
            rows: u16::from_be_bytes(cursor.array()?),
        };
        let links = cursor.list()?;
        let temporary = cursor.list()?;
        let user = cursor.optional()?;
        let passwd = cursor.optional()?;
        let settle = cursor.byte()? != 0;
        cursor.end()?;
        let tty = has_tty.then_some(window);
        Ok(Self {
            argv,
            env,
            cwd,
            create_cwd,
            tty,
            links,
            temporary,
            user,
            passwd,
            settle,
        })
    }
}

impl Reply {
    /// The bytes to send: one message, small enough to be written at once.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (tag, body) = match self {
            Self::Pid(pid) => (b'P', pid.to_be_bytes().to_vec()),
            Self::Master => (b'M', Vec::new()),
            Self::Failed { errno, what } => (b'E', put_failure(*errno, what)),
            Self::NoNamespaces { errno, what } => (b'N', put_failure(*errno, what)),
        };
        let mut message = vec![tag];
        message.extend(u32::try_from(body.len()).unwrap_or_default().to_be_bytes());
        message.extend(body);
        message
    }

    /// Takes the first message off `buffer`, `None` where it is not whole yet.
    pub fn take(buffer: &mut Vec<u8>) -> Result<Option<Self>, WireError> {
        let Some((&tag, rest)) = buffer.split_first() else {
            return Ok(None);
        };
        let Some((head, rest)) = rest.split_first_chunk::<4>() else {
            return Ok(None);
        };
        let length = usize::try_from(u32::from_be_bytes(*head)).unwrap_or(usize::MAX);
        if length > MAX_REPLY {
            return Err(WireError::TooLong(length));
        }
        let Some(body) = rest.get(..length) else {
            return Ok(None);
        };
        let mut cursor = Cursor(body);
        let reply = match tag {
            b'P' => Self::Pid(u32::from_be_bytes(cursor.array()?)),
            b'M' => Self::Master,
            b'E' | b'N' => {
                let errno = i32::from_be_bytes(cursor.array()?);
                let what = String::from_utf8_lossy(std::mem::take(&mut cursor.0)).into_owned();
                if tag == b'E' {
                    Self::Failed { errno, what }
                } else {
                    Self::NoNamespaces { errno, what }
                }
            }
            _ => return Err(WireError::Malformed),
        };
        cursor.end()?;
        buffer.drain(..5 + length);
        Ok(Some(reply))
    }
}

fn put_failure(errno: i32, what: &str) -> Vec<u8> {
    let mut body = errno.to_be_bytes().to_vec();
    body.extend(what.bytes().take(MAX_REPLY - 4));
    body
}

fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) -> Result<(), WireError> {
    let length = u32::try_from(bytes.len()).map_err(|_| WireError::TooLong(bytes.len()))?;
    out.extend(length.to_be_bytes());
    out.extend(bytes);
    Ok(())
}

fn put_list(out: &mut Vec<u8>, list: &[Vec<u8>]) -> Result<(), WireError> {
    let length = u32::try_from(list.len()).map_err(|_| WireError::TooLong(list.len()))?;
    out.extend(length.to_be_bytes());
    list.iter().try_for_each(|item| put_bytes(out, item))
}

struct Cursor<'a>(&'a [u8]);

impl<'a> Cursor<'a> {
    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let (head, rest) = self
            .0
            .split_first_chunk::<N>()
            .ok_or(WireError::Malformed)?;
        self.0 = rest;
        Ok(*head)
    }

    fn byte(&mut self) -> Result<u8, WireError> {
        self.array::<1>().map(|[byte]| byte)
    }

    fn length(&mut self) -> Result<usize, WireError> {
        let length = u32::from_be_bytes(self.array()?);
        usize::try_from(length).map_err(|_| WireError::Malformed)
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let length = self.length()?;
        let (head, rest) = self
            .0
            .split_at_checked(length)
            .ok_or(WireError::Malformed)?;
        self.0 = rest;
        Ok(head)
    }

    fn optional(&mut self) -> Result<Option<Vec<u8>>, WireError> {
        let is_there = self.byte()? != 0;
        let bytes = self.bytes()?;
        Ok(is_there.then(|| bytes.to_vec()))
    }

    fn list(&mut self) -> Result<Vec<Vec<u8>>, WireError> {
        (0..self.length()?)
            .map(|_| self.bytes().map(<[u8]>::to_vec))
            .collect()
    }

    fn end(&self) -> Result<(), WireError> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(WireError::Malformed)
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes() -> impl Strategy<Value = Vec<u8>> {
        proptest::collection::vec(any::<u8>(), 0..40)
    }

    fn list() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(bytes(), 0..8)
    }

    fn spec() -> impl Strategy<Value = LaunchSpec> {
        let tty = proptest::option::of((any::<u16>(), any::<u16>()));
        let lists = (list(), list(), list(), list());
        let user = (proptest::option::of(bytes()), proptest::option::of(bytes()));
        let flags = any::<(bool, bool)>();
        let rest = (bytes(), flags, tty, user);
        (lists, rest).prop_map(|(lists, rest)| {
            let (argv, env, links, temporary) = lists;
            let (cwd, (create_cwd, settle), tty, (user, passwd)) = rest;
            LaunchSpec {
                argv,
                env,
                cwd,
                create_cwd,
                tty: tty.map(|(cols, rows)| Window { cols, rows }),
                links,
                temporary,
                user,
                passwd,
                settle,
            }
        })
    }

    proptest! {
        #[test]
        fn a_spec_comes_back_byte_for_byte(spec in spec()) {
            let message = spec.encode().unwrap();
            prop_assert_eq!(LaunchSpec::decode(&message[4..]).unwrap(), spec);
        }

        #[test]
        fn a_cut_spec_is_refused(spec in spec(), cut in 1_usize..20) {
            let message = spec.encode().unwrap();
            let body = &message[4..];
            prop_assert!(LaunchSpec::decode(&body[..body.len().saturating_sub(cut)]).is_err());
        }

        #[test]
        fn any_bytes_are_refused_or_read_without_panic(bytes in bytes()) {
            drop(LaunchSpec::decode(&bytes));
            drop(Reply::take(&mut bytes.clone()));
        }
    }

    #[test]
    fn replies_come_back_whole_however_they_are_cut() {
        let failed = Reply::Failed {
            errno: 2,
            what: "exec: \"x\"".to_owned(),
        };
        let refused = Reply::NoNamespaces {
            errno: 1,
            what: "no".to_owned(),
        };
        let all = [Reply::Pid(77), Reply::Master, failed, refused];
        let stream: Vec<u8> = all.iter().flat_map(Reply::encode).collect();
        let (mut buffer, mut seen) = (Vec::new(), Vec::new());
        for byte in stream {
            buffer.push(byte);
            seen.extend(Reply::take(&mut buffer).unwrap());
        }
        assert_eq!(seen, all);
        assert!(buffer.is_empty());
    }
}
