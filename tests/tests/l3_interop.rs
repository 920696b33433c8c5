//! Every client of docs/interop.md: exec, terminal, attach, port-forward, logs -f, cp, each on a pod of its own.

use knoc_tests::interop::run;

#[tokio::test]
async fn kubectl_1_30_supports_all_verbs() -> anyhow::Result<()> {
    run("kubectl 1.30").await
}

#[tokio::test]
async fn kubectl_1_34_supports_all_verbs() -> anyhow::Result<()> {
    run("kubectl 1.34").await
}

#[tokio::test]
async fn kubectl_1_36_supports_all_verbs() -> anyhow::Result<()> {
    run("kubectl 1.36").await
}

#[tokio::test]
async fn kubectl_1_37_supports_all_verbs() -> anyhow::Result<()> {
    run("kubectl 1.37").await
}

#[tokio::test]
async fn the_go_client_supports_all_verbs_over_spdy() -> anyhow::Result<()> {
    run("Go client-go, SPDY").await
}

#[tokio::test]
async fn the_go_client_supports_all_verbs_over_websocket() -> anyhow::Result<()> {
    run("Go client-go, WebSocket").await
}

#[tokio::test]
async fn the_python_client_supports_all_verbs() -> anyhow::Result<()> {
    run("Python kubernetes").await
}

#[tokio::test]
async fn the_javascript_client_supports_all_verbs() -> anyhow::Result<()> {
    run("JavaScript @kubernetes/client-node").await
}

#[tokio::test]
async fn the_rust_client_supports_all_verbs() -> anyhow::Result<()> {
    run("Rust kube").await
}
