// Command client is client-go as a command line program; ../README.md describes the contract. KNOC_TRANSPORT selects one of its
// two transports: spdy or websocket.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"

	"golang.org/x/term"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

// failed is the exit code if the client itself failed.
const failed = 125

type client struct {
	config    *rest.Config
	websocket bool
	namespace string
	pod       string
}

func main() {
	err := run(os.Args[1:])
	var ended exec.CodeExitError
	switch {
	case err == nil:
	case errors.As(err, &ended):
		os.Exit(ended.Code)
	default:
		fmt.Fprintln(os.Stderr, err)
		os.Exit(failed)
	}
}

func run(words []string) error {
	if len(words) < 4 {
		return errors.New("usage: client VERB NAMESPACE POD CONTAINER|PORT [COMMAND...]")
	}
	config, err := clientcmd.BuildConfigFromFlags("", os.Getenv("KUBECONFIG"))
	if err != nil {
		return err
	}
	if words[0] == "elect" {
		return elect(config, words[1], words[2], words[3])
	}
	c := client{config: config, websocket: os.Getenv("KNOC_TRANSPORT") == "websocket", namespace: words[1], pod: words[2]}
	what, command := words[3], words[4:]
	switch words[0] {
	case "exec":
		return c.stream("exec", what, command, remotecommand.StreamOptions{Stdout: os.Stdout, Stderr: os.Stderr})
	case "exec-stdin":
		return c.stream("exec", what, command, remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	case "exec-tty":
		size := &ownSize{}
		return c.stream("exec", what, command, remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Tty: true, TerminalSizeQueue: size})
	case "attach":
		return c.stream("attach", what, nil, remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr})
	case "port-forward":
		return c.forward(what)
	case "logs":
		return c.logs(what)
	}
	return fmt.Errorf("no verb %q", words[0])
}

// url returns the URL of a subresource of the pod.
func (c client) url(subresource string, query url.Values) (*url.URL, error) {
	base, _, err := rest.DefaultServerUrlFor(c.config)
	if err != nil {
		return nil, err
	}
	whole := base.JoinPath("api/v1/namespaces", c.namespace, "pods", c.pod, subresource)
	whole.RawQuery = query.Encode()
	return whole, nil
}

func (c client) stream(subresource, container string, command []string, options remotecommand.StreamOptions) error {
	query := url.Values{"container": {container}, "command": command}
	for name, wanted := range map[string]bool{
		"stdin": options.Stdin != nil, "stdout": options.Stdout != nil, "stderr": options.Stderr != nil, "tty": options.Tty,
	} {
		if wanted {
			query.Set(name, "true")
		}
	}
	to, err := c.url(subresource, query)
	if err != nil {
		return err
	}
	var executor remotecommand.Executor
	if c.websocket {
		executor, err = remotecommand.NewWebSocketExecutor(c.config, http.MethodGet, to.String())
	} else {
		executor, err = remotecommand.NewSPDYExecutor(c.config, http.MethodPost, to)
	}
	if err != nil {
		return err
	}
	return executor.StreamWithContext(context.Background(), options)
}

// ownSize reports the size of our terminal once.
type ownSize struct{ told bool }

func (s *ownSize) Next() *remotecommand.TerminalSize {
	if s.told {
		return nil
	}
	s.told = true
	width, height, err := term.GetSize(int(os.Stdin.Fd()))
	if err != nil {
		return nil
	}
	return &remotecommand.TerminalSize{Width: uint16(width), Height: uint16(height)}
}

func (c client) dialer() (httpstream.Dialer, error) {
	to, err := c.url("portforward", nil)
	if err != nil {
		return nil, err
	}
	if c.websocket {
		return portforward.NewSPDYOverWebsocketDialer(to, c.config)
	}
	transport, upgrader, err := spdy.RoundTripperFor(c.config)
	if err != nil {
		return nil, err
	}
	return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, to), nil
}

// forward listens as the library does, and is its only caller.
func (c client) forward(port string) error {
	dialer, err := c.dialer()
	if err != nil {
		return err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, []string{"0:" + port}, stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case err := <-ended:
		return err
	case <-ready:
	}
	ports, err := forwarder.GetPorts()
	if err != nil {
		return err
	}
	if err := talk(int(ports[0].Local)); err != nil {
		return err
	}
	close(stop)
	return <-ended
}

// talk sends standard input and its end, and passes on the answer until it ends.
func talk(port int) error {
	connection, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return err
	}
	defer connection.Close()
	go func() {
		_, _ = io.Copy(connection, os.Stdin)
		_ = connection.CloseWrite()
	}()
	_, err = io.Copy(os.Stdout, connection)
	return err
}

func (c client) logs(container string) error {
	from, err := c.url("log", url.Values{"container": {container}, "follow": {"true"}})
	if err != nil {
		return err
	}
	web, err := rest.HTTPClientFor(c.config)
	if err != nil {
		return err
	}
	answer, err := web.Get(from.String())
	if err != nil {
		return err
	}
	defer answer.Body.Close()
	if answer.StatusCode != http.StatusOK {
		words, _ := io.ReadAll(answer.Body)
		return fmt.Errorf("%s: %s", answer.Status, words)
	}
	_, err = io.Copy(os.Stdout, answer.Body)
	return err
}
