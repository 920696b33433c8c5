//! PURE: encoding of the launch protocol. It has no version, because both ends are the same binary.
//!
//! The shim sends the launcher one [`LaunchSpec`], length-prefixed, with the stdio descriptors
//! attached to its first byte. The launcher answers with any number of [`Reply`] messages and then
//! closes the socket. End of file means that the program runs, unless a [`Reply::Failed`] came
//! before.

/// The maximum size of a specification in bytes; Linux limits argv and environment to far less.
pub const MAX_SPEC: usize = 16 << 20;
const MAX_REPLY: usize = 64 << 10;

/// Where the volumes are mounted that the pod mounts below `/dev`: here, mount points can be created.
pub const VOLUMES: &str = "/.knoc/dev";

/// A second name of the file that the shim mounts at the path of the termination message.
pub const MESSAGE: &str = "/.knoc/message";

/// The size of a terminal window, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// Columns.
    pub cols: u16,
    /// Rows.
    pub rows: u16,
}

/// The program that the launcher becomes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LaunchSpec {
    /// The program and its arguments. The program is searched for in the `PATH` of `env`.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=value`, in order.
    pub env: Vec<Vec<u8>>,
    /// The working directory.
    pub cwd: Vec<u8>,
    /// Create the working directory if it does not exist, as container runtimes do.
    pub create_cwd: bool,
    /// Run the program on a terminal of this size instead of pipes, and send its master back.
    pub tty: Option<Window>,
    /// Symbolic links to create, as alternating names and targets. They are needed below `/dev`,
    /// where nothing can be mounted. Only that of the default termination message may be missing. For
    /// [`MESSAGE`], and without a target, nothing is created: at the name the program must be able to
    /// write its termination message.
    pub links: Vec<Vec<u8>>,
    /// Folders of the image that everybody may write to; they are created if they do not exist.
    pub temporary: Vec<Vec<u8>>,
    /// The user whose home directory the program gets, in the form of an image's `User`. `None`
    /// means the user that the program runs as.
    pub user: Option<Vec<u8>>,
    /// The image's own `/etc/passwd`, if the container's may describe the user differently.
    pub passwd: Option<Vec<u8>>,
    /// Make the entry of the program's own user in the container's `/etc/passwd`, which is the
    /// runtime's, say what the image says about `user`.
    pub settle: bool,
    /// The variable that gets the number of the fourth descriptor, which the program keeps open: what
    /// a rank of an MPI program talks to its process manager with (`PMI_FD`). `None`: there are three.
    pub descriptor: Option<Vec<u8>>,
    /// The user and the group that the program is to see itself as, in a user namespace of its own.
    /// `None`: those that it has, and for a group of a named user, that of the image's `passwd` file.
    pub uid: Option<u32>,
    /// See [`Self::uid`].
    pub gid: Option<u32>,
}

/// What the launcher tells the shim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// The program's PID in the shim's PID namespace. `enter` sends it, because it forks.
    Pid(u32),
    /// A descriptor is attached to this message: the terminal's master, or what `contain` was asked
    /// for.
    Master,
    /// The program cannot be started.
    Failed {
        /// The errno of the failed call; 0 if no system call failed.
        errno: i32,
        /// The operation that failed.
        what: String,
    },
    /// The node gives the program no user namespace of its own, so it keeps the ids that it has.
    OwnIds,
    /// The user, the group and the further groups of the program, by the numbers that it sees.
    Ids(Vec<u32>),
    /// `contain` cannot create its namespaces on this node.
    NoNamespaces {
        /// The errno of the failed call.
        errno: i32,
        /// The operation that failed.
        what: String,
    },
}

/// Why bytes are not a message of this protocol.
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
    /// Encodes the specification, with its length first.
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
        body.push(u8::from(self.descriptor.is_some()));
        put_bytes(&mut body, self.descriptor.as_deref().unwrap_or_default())?;
        for id in [self.uid, self.gid] {
            body.extend(id.map_or(-1, i64::from).to_be_bytes());
        }
        if body.len() > MAX_SPEC {
            return Err(WireError::TooLong(body.len()));
        }
        let mut message = Vec::with_capacity(body.len() + 4);
        put_bytes(&mut message, &body)?;
        Ok(message)
    }

    /// Decodes a specification from its body, without the length.
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
        let descriptor = cursor.optional()?;
        let [uid, gid] = [cursor.id()?, cursor.id()?];
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
            descriptor,
            uid,
            gid,
        })
    }
}

impl Reply {
    /// Encodes the message. It is small enough to be sent with one write.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let (tag, body) = match self {
            Self::Pid(pid) => (b'P', pid.to_be_bytes().to_vec()),
            Self::Master => (b'M', Vec::new()),
            Self::OwnIds => (b'I', Vec::new()),
            Self::Ids(ids) => (b'U', ids.iter().flat_map(|id| id.to_be_bytes()).collect()),
            Self::Failed { errno, what } => (b'E', put_failure(*errno, what)),
            Self::NoNamespaces { errno, what } => (b'N', put_failure(*errno, what)),
        };
        let mut message = vec![tag];
        message.extend(u32::try_from(body.len()).unwrap_or_default().to_be_bytes());
        message.extend(body);
        message
    }

    /// Takes the first message off `buffer`; `None` if it is not complete yet.
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
            b'I' => Self::OwnIds,
            b'U' => {
                let (ids, rest) = cursor.0.as_chunks::<4>();
                cursor.0 = rest;
                Self::Ids(ids.iter().map(|id| u32::from_be_bytes(*id)).collect())
            }
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

    /// A user or a group; a negative number stands for none.
    fn id(&mut self) -> Result<Option<u32>, WireError> {
        Ok(u32::try_from(i64::from_be_bytes(self.array()?)).ok())
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
        let optional = || proptest::option::of(bytes());
        let user = (optional(), optional(), optional());
        let flags = any::<(bool, bool)>();
        let ids = any::<(Option<u32>, Option<u32>)>();
        let rest = (bytes(), flags, tty, user, ids);
        (lists, rest).prop_map(|(lists, rest)| {
            let (argv, env, links, temporary) = lists;
            let (cwd, (create_cwd, settle), tty, (user, passwd, descriptor), (uid, gid)) = rest;
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
                descriptor,
                uid,
                gid,
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
        fn a_truncated_spec_is_rejected(spec in spec(), cut in 1_usize..20) {
            let message = spec.encode().unwrap();
            let body = &message[4..];
            prop_assert!(LaunchSpec::decode(&body[..body.len().saturating_sub(cut)]).is_err());
        }

        #[test]
        fn any_bytes_are_rejected_or_read_without_panic(bytes in bytes()) {
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
        let all = [
            Reply::Pid(77),
            Reply::Master,
            Reply::OwnIds,
            Reply::Ids(vec![1000, 0, u32::MAX]),
            failed,
            refused,
        ];
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
