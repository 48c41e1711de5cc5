package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"github.com/renewd/renewd/internal/cli"
	"github.com/renewd/renewd/internal/config"
	"github.com/renewd/renewd/metrics"
)

// maxPassword is the maximum size of a password file in bytes.
const maxPassword = 64 << 10

// maxScrape is the maximum size in bytes of an answer of the agent's HTTP listener.
const maxScrape = 32 << 20

// endpoint is the HTTP listener of a running agent, as the flags give it.
type endpoint struct {
	url, ca, user, passwordFile string
	timeout                     time.Duration
}

// flags adds the flags of httpUsage to a call.
func (p *endpoint) flags(call *cli.Call) {
	fset := call.Flags
	fset.StringVar(&p.url, "url", defaultURL(call.Getenv("RENEWD_METRICS_ADDRESS")), "")
	fset.StringVar(&p.ca, "ca", "", "")
	fset.StringVar(&p.user, "user", "", "")
	fset.StringVar(&p.passwordFile, "password-file", "", "")
	fset.DurationVar(&p.timeout, "timeout", 5*time.Second, "")
}

// defaultURL returns the URL of an agent on this node that listens on address. For a
// listener on all addresses it is the loopback address.
func defaultURL(address string) string {
	host, port, err := net.SplitHostPort(address)
	if err != nil {
		return "http://" + metrics.DefaultAddress
	}
	if ip := net.ParseIP(host); host == "" || (ip != nil && ip.IsUnspecified()) {
		host = "127.0.0.1"
	}
	return "http://" + net.JoinHostPort(host, port)
}

// get returns the status and the body of path. The status is 0 without an answer.
func (p *endpoint) get(ctx context.Context, path string) (int, []byte, error) {
	client, err := p.client()
	if err != nil {
		return 0, nil, err
	}
	defer client.CloseIdleConnections()
	ctx, cancel := context.WithTimeout(ctx, p.timeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, strings.TrimSuffix(p.url, "/")+path, nil)
	if err != nil {
		return 0, nil, cli.Usagef("--url %q is not a URL", p.url)
	}
	if p.user != "" {
		password, err := config.ReadFile(p.passwordFile, maxPassword)
		if err != nil {
			return 0, nil, fmt.Errorf("read password: %w", err)
		}
		req.SetBasicAuth(p.user, strings.TrimRight(string(password), "\r\n"))
	}
	resp, err := client.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return 0, nil, fmt.Errorf("query agent: %w: no agent is listening; start it, or give its metrics.address with --url", err)
	}
	if err != nil {
		return 0, nil, fmt.Errorf("query agent: %w%s", err, schemeRemedy(err))
	}
	defer func() { _ = resp.Body.Close() }()
	body, err := io.ReadAll(io.LimitReader(resp.Body, maxScrape+1))
	if err != nil {
		return 0, nil, fmt.Errorf("read the agent's answer: %w", err)
	}
	if len(body) > maxScrape {
		return 0, nil, fmt.Errorf("the answer of %s is larger than %d bytes", p.url, maxScrape)
	}
	if resp.StatusCode == http.StatusBadRequest && bytes.Contains(body, []byte("HTTP request to an HTTPS server")) {
		return 0, nil, fmt.Errorf("query agent: %s speaks HTTPS, by its web configuration file: give its https URL with --url, and --ca", p.url)
	}
	return resp.StatusCode, body, nil
}

// schemeRemedy returns the remedy for the wrong scheme in --url; "" for another error.
func schemeRemedy(err error) string {
	if errors.Is(err, http.ErrSchemeMismatch) {
		return ": give its http URL with --url"
	}
	if _, unknown := errors.AsType[x509.UnknownAuthorityError](err); unknown {
		return ": give the CA of its certificate with --ca"
	}
	return ""
}

func (p *endpoint) client() (*http.Client, error) {
	transport := &http.Transport{} // no proxy: the agent is on this node
	if p.ca != "" {
		pem, err := os.ReadFile(p.ca)
		if err != nil {
			return nil, fmt.Errorf("read --ca: %w", err)
		}
		pool := x509.NewCertPool()
		if !pool.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("--ca %s contains no PEM certificate", p.ca)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS12}
	}
	return &http.Client{Transport: transport}, nil
}

// ready queries /ready and returns why the agent is not ready, nil if it is.
func (p *endpoint) ready(ctx context.Context) (reasons []string, err error) {
	code, body, err := p.get(ctx, "/ready")
	text := strings.TrimSpace(string(body))
	switch {
	case err != nil:
		return nil, err
	case code == http.StatusOK:
		return nil, nil
	case code == http.StatusServiceUnavailable && text != "":
		return strings.Split(text, "\n"), nil
	}
	return nil, statusError(p.url+"/ready", code)
}

func statusError(url string, code int) error {
	if code == http.StatusUnauthorized {
		return fmt.Errorf("%s requires a user and a password: give --user and --password-file", url)
	}
	return fmt.Errorf("%s answers %d %s", url, code, http.StatusText(code))
}
