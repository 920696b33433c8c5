use super::*;

fn registry(prefix: &str, mirror: Option<&str>, insecure: bool) -> Registry {
    Registry {
        prefix: prefix.to_owned(),
        mirror: mirror.map(str::to_owned),
        insecure,
        credentials: false,
    }
}

#[test]
fn addresses_of_this_host_link_and_cloud_are_refused_in_all_their_forms() {
    for (text, kind) in [
        ("127.0.0.1", "loopback"),
        ("127.1.2.3", "loopback"),
        ("0.0.0.0", "unspecified"),
        ("0.1.2.3", "unspecified"),
        ("169.254.1.1", "link-local"),
        ("169.254.169.254", "metadata"),
        ("100.100.100.200", "metadata"),
        ("224.0.0.1", "multicast"),
        ("255.255.255.255", "broadcast"),
        ("::", "unspecified"),
        ("::1", "loopback"),
        ("::ffff:127.0.0.1", "loopback"),
        ("::127.0.0.1", "loopback"),
        ("::ffff:0:127.0.0.1", "loopback"),
        ("64:ff9b::7f00:1", "loopback"),
        ("64:ff9b::a9fe:a9fe", "metadata"),
        ("2002:7f00:1::", "loopback"),
        ("fe80::1", "link-local"),
        ("febf::1", "link-local"),
        ("ff02::1", "multicast"),
        ("fd00:ec2::254", "metadata"),
        ("fd20:ce::254", "metadata"),
        ("fd00:c1::a9fe:a9fe", "metadata"),
        ("fd00:42::42", "metadata"),
    ] {
        let is = forbidden(text.parse().unwrap());
        assert!(is.is_some_and(|is| is.contains(kind)), "{text}: {is:?}");
    }
    for text in ["10.77.0.1", "192.168.1.1", "8.8.8.8", "2a00::1", "fd12::1"] {
        assert_eq!(forbidden(text.parse().unwrap()), None, "{text}");
    }
}

#[test]
fn urls_are_read_or_refused() {
    for (text, expected) in [
        ("https://a.b/x?y=1", "https://a.b/x"),
        ("http://A.b:80", "http://a.b/"),
        ("https://[::1]:5000/v2/", "https://[::1]:5000/v2/"),
        ("http://127.0.0.1:6001/t", "http://127.0.0.1:6001/t"),
        ("https://a.b?x", "https://a.b/"),
    ] {
        let url = Url::parse(text).unwrap();
        assert_eq!(url.to_string(), expected, "{text}");
    }
    assert_eq!(Url::parse("https://a.b?x").unwrap().path, "/?x");
    for text in [
        "ftp://a.b/x",
        "file:///etc/passwd",
        "gopher://x",
        "/x",
        "",
        "https://",
        "https://user:pw@a.b/",
        "https://a.b:99999/",
        "https://a.b:0/",
        "https://a.b:x/",
        "unix:/run/x.sock",
        "http://0[=]/",
        "https://[=]/",
    ] {
        assert!(Url::parse(text).is_err(), "{text}: {:?}", Url::parse(text));
    }
}

#[test]
fn a_host_has_one_form_however_it_is_written() {
    for (text, expected) in [
        ("127.0.0.1", "127.0.0.1"),
        ("127.1", "127.0.0.1"),
        ("127.0.1", "127.0.0.1"),
        ("2130706433", "127.0.0.1"),
        ("017700000001", "127.0.0.1"),
        ("0x7F000001", "127.0.0.1"),
        ("0x7f.1", "127.0.0.1"),
        ("0177.0.0.01", "127.0.0.1"),
        ("127.0.0.1.", "127.0.0.1"),
        ("0", "0.0.0.0"),
        ("0x", "0.0.0.0"),
        ("169.254.43518", "169.254.169.254"),
        ("255.255.255.255", "255.255.255.255"),
        ("Reg.Example.", "reg.example"),
        ("1.example", "1.example"),
        ("0xyz", "0xyz"),
        ("[0:0::1]", "::1"),
        ("[::ffff:127.0.0.1]", "::ffff:127.0.0.1"),
    ] {
        let url = Url::parse(&format!("https://{text}/"));
        assert_eq!(url.map(|url| url.host).as_deref(), Ok(expected), "{text}");
    }
    for text in [
        "256.1.1.1",
        "1.256.1",
        "127.16777216",
        "4294967296",
        "99999999999999999999999",
        "1.2.3.4.5",
        "1..2",
        "08.1",
        "a.1",
        "a.0x7f",
        ".",
        "+1.1",
    ] {
        let url = Url::parse(&format!("https://{text}/"));
        assert!(url.is_err(), "{text}: {url:?}");
    }
}

#[test]
fn slots_are_counted_by_hosts() {
    for same in [
        "reg.example",
        "Reg.example",
        "REG.example:443",
        "reg.example:5000",
    ] {
        assert_eq!(host_of(same), "reg.example", "{same}");
    }
    assert_eq!(host_of("127.1:5000"), host_of("127.0.0.1:5001"));
    assert_eq!(host_of("[0:0::1]:5000"), host_of("[::1]"));
    assert_eq!(host_of("docker.io"), host_of("registry-1.docker.io"));
    assert_ne!(host_of("a.example"), host_of("b.example"));
}

#[test]
fn locations_are_relative_to_the_url_of_the_answer() {
    let here = Url::parse("https://a.b:5000/v2/x/blobs/d?q").unwrap();
    for (location, expected) in [
        ("/y", "https://a.b:5000/y"),
        ("z", "https://a.b:5000/v2/x/blobs/z"),
        ("//c.d/e", "https://c.d/e"),
        ("http://c.d/e", "http://c.d/e"),
        ("?n", "https://a.b:5000/v2/x/blobs/d"),
    ] {
        assert_eq!(here.join(location).unwrap().to_string(), expected);
    }
    assert!(here.join("").is_err());
    assert!(here.join("ftp://c.d/").is_err());
}

#[test]
fn what_the_site_names_is_exempt_and_nothing_beside_it() {
    let registries = [
        registry("LocalHost:5000", None, true),
        registry("docker.io", Some("127.0.0.1:7000/hub"), false),
        registry("Registry.Example.org", None, false),
    ];
    let rules = Rules::new(&registries, Some("http://127.0.0.1:7100/library"));
    let address = |text: &str, ip: &str| {
        rules
            .address(&Url::parse(text).unwrap(), ip.parse().unwrap(), false)
            .is_ok()
    };
    assert!(address("http://localhost:5000/x", "127.0.0.1"));
    assert!(address("http://localhost:5000/x", "::1"));
    assert!(!address("http://localhost:5001/x", "127.0.0.1"));
    assert!(address("https://127.0.0.1:7000/x", "127.0.0.1"));
    assert!(address("http://127.0.0.1:7100/v1/x", "127.0.0.1"));
    assert!(!address("http://127.0.0.1:7101/v1/x", "127.0.0.1"));
    assert!(address("https://registry.example.org/x", "127.0.0.1"));
    assert!(!address("https://registry.example.org:6001/x", "127.0.0.1"));
    assert!(!address("https://evil.example.org/x", "127.0.0.1"));
    assert!(address("https://evil.example.org/x", "10.0.0.1"));
    let of_this_host = |text: &str| {
        let (url, ip) = (Url::parse(text).unwrap(), "10.0.0.1".parse().unwrap());
        rules.address(&url, ip, true).is_ok()
    };
    assert!(of_this_host("https://registry.example.org/x"));
    assert!(!of_this_host("https://evil.example.org/x"));
    let scheme = |text: &str, plain| rules.scheme(&Url::parse(text).unwrap(), plain).is_ok();
    assert!(scheme("http://localhost:5000/x", false));
    assert!(scheme("http://127.0.0.1:7100/v1/x", false));
    assert!(!scheme("http://127.0.0.1:7000/x", false));
    assert!(!scheme("http://a.b/x", false));
    assert!(scheme("https://a.b/x", false));
    // What an insecure registry names: its own host at any port, and no other host.
    assert!(scheme("http://localhost:5001/token", true));
    assert!(!scheme("http://localhost:5001/token", false));
    assert!(!scheme("http://registry.example.org/x", true));
    assert!(!scheme("http://a.b/x", true));
    assert!(!scheme("http://registry-1.docker.io/x", true));
    let host = |text: &str| rules.host(&Url::parse(text).unwrap()).is_ok();
    assert!(!host("https://localhost/x") && !host("https://a.localhost./x"));
    assert!(!host("https://[::1]/x") && host("https://a.b/x"));
    for text in [
        "http://127.1/",
        "http://2130706433/",
        "http://0x7f.1/",
        "http://0177.1/",
        "http://0/",
        "http://127.0.0.1./",
        "http://169.254.43518/",
        "http://[::ffff:127.0.0.1]/",
        "http://[::ffff:7f00:1]/",
        "http://LOCALHOST./",
        "http://localhost.localdomain./",
        "http://ip6-loopback/",
    ] {
        assert!(!host(text), "{text}");
    }
    assert!(host("http://localhost.:5000/"), "the site names it");
    assert!(host("https://10.1/x") && host("https://a.b./x"));
}

#[test]
fn a_refusal_names_the_address_and_what_to_do() {
    let url = Url::parse("http://127.0.0.1:6001/token?secret").unwrap();
    let message = Rules::default().address(&url, "127.0.0.1".parse().unwrap(), false);
    assert_eq!(
        message.unwrap_err(),
        "http://127.0.0.1:6001/token is refused: 127.0.0.1 is a loopback address; to allow it, name \
         \"127.0.0.1:6001\" as the prefix of a [[registry]] of the site file"
    );
}
