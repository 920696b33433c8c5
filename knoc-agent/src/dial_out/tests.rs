use std::path::Path;

use super::*;
use crate::config::Home;

fn config(tables: &str) -> Result<Config, String> {
    let text = format!("site = \"t\"\n{tables}\n[tls]\nca = \"/a\"\ncert = \"/b\"\nkey = \"/c\"\n");
    let home = Home {
        home: "/home/ann".into(),
    };
    let config = Config::parse(&text, Path::new("agent.toml"), &home);
    config.map_err(|error| error.to_string())
}

#[test]
fn the_site_file_says_which_way_leads_to_a_kubelet() {
    let config = config(
        r#"
[env]
https_proxy = "http://of-site:3128"
no_proxy = ".near.example.org"
[[dial_out]]
address = "a.example.org:443"
[[dial_out]]
address = "a.near.example.org:443"
kubelet = "k"
[[dial_out]]
address = "b.example.org:443"
proxy = "none"
[[dial_out]]
address = "10.0.0.1:30350"
server_name = "c.example.org"
proxy = "http://own:8080"
proxy_credentials = "~/proxy"
"#,
    );
    let targets = targets(&config.unwrap()).unwrap();
    let ways: Vec<String> = targets.iter().map(|one| one.carrier.to_string()).collect();
    assert_eq!(
        ways,
        [
            "tcp:a.example.org:443 through the proxy http://of-site:3128",
            "tcp:a.near.example.org:443",
            "tcp:b.example.org:443",
            "tcp:10.0.0.1:30350 through the proxy http://own:8080",
        ]
    );
    assert_eq!(targets[1].expect.to_string(), "spiffe://knoc/kubelet/k");
    assert_eq!(targets[3].server_name.as_deref(), Some("c.example.org"));
}

#[test]
fn every_mistake_is_named() {
    for (entry, words) in [
        ("", "dial_out.address: is missing"),
        (
            "address = \"kubelet\"",
            "dial_out.address: \"kubelet\" is not HOST:PORT",
        ),
        ("address = \"unix:/x\"", "is not HOST:PORT"),
        (
            "address = \"k:1\"\nserver_name = \"a b\"",
            "dial_out.server_name",
        ),
        ("address = \"k:1\"\nkubelet = \"a/b\"", "dial_out.kubelet"),
        (
            "address = \"k:1\"\nproxy = \"socks5://p:1\"",
            "dial_out.proxy: begins with socks5://",
        ),
        (
            "address = \"k:1\"\nproxy = \"http://u:p@p:1\"",
            "dial_out.proxy: contains a user",
        ),
        (
            "address = \"k:1\"\nproxy_credentials = \"/x\"",
            "dial_out.proxy_credentials: belongs",
        ),
        (
            "address = \"k:1\"\nproxy = \"p:1\"\nproxy_credentials = \"x\"",
            "dial_out.proxy_credentials: must be absolute",
        ),
        ("adress = \"k:1\"", "did you mean `address`"),
    ] {
        let error = config(&format!("[[dial_out]]\n{entry}")).unwrap_err();
        assert!(error.contains(words), "{words}: {error}");
        assert!(!error.contains("u:p@"), "{error}");
    }
    let many = "[[dial_out]]\naddress = \"k:1\"\n".repeat(17);
    let error = config(&many).unwrap_err();
    assert!(error.contains("dial_out: has 17 entries"), "{error}");
    let home = Home { home: "/h".into() };
    let text = "site = \"t\"\n[[dial_out]]\naddress = \"k:1\"\n";
    let error = Config::parse(text, Path::new("agent.toml"), &home).unwrap_err();
    assert!(error.to_string().contains("[tls]"), "{error}");
}

#[test]
fn a_variable_of_the_site_file_is_named() {
    let config = config(
        "[[dial_out]]\naddress = \"a.example.org:443\"\n[env]\nHTTPS_PROXY = \"https://p:1\"",
    );
    let error = targets(&config.unwrap()).unwrap_err().to_string();
    assert!(
        error.contains("HTTPS_PROXY") && error.contains("https://"),
        "{error}"
    );
}
