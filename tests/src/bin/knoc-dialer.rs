//! What pods and floors dial with in the benchmarks of egress, and a server for datagrams. It uses only the standard library: the benchmark compiles this file
//! for musl, puts it into an image, and runs it on the nodes.
//!
//! - `knoc-dialer first ADDRESS COUNT` connects, sends a request line and waits for the first byte, COUNT times.
//! - `knoc-dialer send ADDRESS BYTES` connects, sends that many bytes and waits until the other side closes.
//! - `knoc-dialer names ADDRESS NAME COUNT` asks a DNS server COUNT times for NAME; `%` in it is replaced by a number each time.
//! - `knoc-dialer hold ADDRESS COUNT` opens COUNT connections, and holds them until it is killed.
//! - `knoc-dialer relay PORT ADDRESS` passes connections on to ADDRESS, without TLS: the floor.
//! - `knoc-dialer sink PORT` reads connections to their ends, one after the other, and closes each then.
//! - `knoc-dialer echo ADDRESS` sends each datagram that comes there back.
//!
//! The first three print the microseconds of each time on a line of its own.

use std::{
    io::{Error, ErrorKind, Read, Result, Write, copy},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket},
    thread,
    time::{Duration, Instant},
};

/// How long one answer may take.
const PATIENCE: Duration = Duration::from_secs(20);

/// The size of the buffer for sending.
const CHUNK: usize = 64 << 10;

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words.as_slice() {
        ["first", address, count] => {
            let address = parse(address)?;
            repeat(parse(count)?, |_| first(address))
        }
        ["send", address, bytes] => {
            let (address, bytes) = (parse(address)?, parse(bytes)?);
            repeat(1, |_| send(address, bytes))
        }
        ["names", address, name, count] => {
            let address = parse(address)?;
            repeat(parse(count)?, |number| {
                ask(address, &name.replace('%', &number.to_string()), number)
            })
        }
        ["hold", address, count] => hold(parse(address)?, parse(count)?),
        ["relay", port, address] => relay(parse(port)?, parse(address)?),
        ["sink", port] => sink(parse(port)?),
        ["echo", address] => echo(parse(address)?),
        _ => Err(wrong("first, send, names, hold, relay, sink or echo")),
    }
}

fn sink(port: u16) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    for peer in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let mut peer = peer?;
        while peer.read(&mut chunk).is_ok_and(|count| count > 0) {}
    }
    Ok(())
}

fn echo(address: SocketAddr) -> Result<()> {
    let socket = UdpSocket::bind(address)?;
    let mut buffer = vec![0; CHUNK];
    loop {
        let (length, from) = socket.recv_from(&mut buffer)?;
        socket.send_to(&buffer[..length], from)?;
    }
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, what.to_owned())
}

fn parse<T: std::str::FromStr>(text: &str) -> Result<T> {
    text.parse()
        .map_err(|_| wrong(&format!("{text:?} is not what is expected there")))
}

fn repeat(count: u32, mut action: impl FnMut(u32) -> Result<()>) -> Result<()> {
    for number in 0..count {
        let began = Instant::now();
        action(number)?;
        let took = began.elapsed();
        writeln!(std::io::stdout(), "{}", took.as_micros())?;
    }
    std::io::stdout().flush()
}

fn first(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    // A server with TLS answers that, too: with an error.
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    stream.read_exact(&mut [0])
}

fn send(address: SocketAddr, bytes: u64) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    let chunk = vec![0; CHUNK];
    let mut left = usize::try_from(bytes).map_err(|_| wrong("fewer bytes"))?;
    while left > 0 {
        let part = chunk.get(..left.min(CHUNK)).unwrap_or_default();
        stream.write_all(part)?;
        left -= part.len();
    }
    stream.shutdown(Shutdown::Write)?;
    stream.read_to_end(&mut Vec::new()).map(drop)
}

/// As the resolvers of the C libraries do, each question has a port of its own.
fn ask(address: SocketAddr, name: &str, number: u32) -> Result<()> {
    let socket = UdpSocket::bind("0.0.0.0:0")?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.connect(address)?;
    let id = number.to_be_bytes();
    let mut question = vec![id[2], id[3], 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        let length = u8::try_from(label.len()).map_err(|_| wrong("a shorter name"))?;
        question.push(length);
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    socket.send(&question)?;
    let mut answer = [0; 512];
    let count = socket.recv(&mut answer)?;
    let answered = answer.get(..2) == question.get(..2) && count > question.len();
    answered
        .then_some(())
        .ok_or_else(|| wrong("an answer with an address"))
}

fn hold(address: SocketAddr, count: u32) -> Result<()> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        // The first byte of the other side says that the connection was made.
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.read_exact(&mut [0])?;
        held.push(stream);
    }
    writeln!(std::io::stdout(), "held {}", held.len())?;
    std::io::stdout().flush()?;
    loop {
        thread::park();
    }
}

fn relay(port: u16, to: SocketAddr) -> Result<()> {
    for near in TcpListener::bind(("0.0.0.0", port))?.incoming() {
        let near = near?;
        thread::spawn(move || pass(&near, to));
    }
    Ok(())
}

fn pass(near: &TcpStream, to: SocketAddr) -> Result<()> {
    let far = TcpStream::connect(to)?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    thread::scope(|scope| {
        scope.spawn(|| one_way(near, &far));
        one_way(&far, near)
    })
}

fn one_way(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    copy(&mut from, &mut to)?;
    to.shutdown(Shutdown::Write)
}
