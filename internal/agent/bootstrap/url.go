package bootstrap

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/renewd/renewd/bundle"
	"github.com/renewd/renewd/internal/config"
)

const (
	// timeout bounds one request with its redirects.
	timeout = 30 * time.Second
	// maxRedirects is how many redirects are followed.
	maxRedirects = 5
	// maxCA is the largest file with CA certificates that is read, in bytes.
	maxCA = 1 << 20
)

// URLConfig says where a bundle is published, and what a local publisher receives.
type URLConfig struct {
	// URL is an https URL, or unix:///PATH or unix:///PATH:/REQUEST for a publisher that
	// speaks HTTP on the Unix socket PATH. REQUEST is / by default.
	URL string
	// CAFile has the CA certificates (PEM) that an https certificate must chain to. It is
	// read at each request. Empty: those of the system.
	CAFile        string
	TrustDomain   spiffeid.TrustDomain
	ServerAddress string // host:port
}

// URL is a bundle that is published at a URL. Make it with [NewURL].
type URL struct {
	cfg    URLConfig
	url    *url.URL // of the request
	socket string   // path of the Unix socket; empty for https
	// name is the URL for errors: without its query, which may have a secret, as that of a
	// presigned URL does.
	name string
}

// NewURL returns the source of a URL. Its error continues a sentence that begins with the
// URL's place.
func NewURL(cfg URLConfig) (*URL, error) {
	u, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, errors.New("is not a URL")
	}
	switch {
	case u.Scheme == "https" && u.Hostname() != "" && u.User == nil:
		return &URL{cfg: cfg, url: u, name: withoutQuery(u)}, nil
	case u.Scheme == "https" && u.User != nil:
		return nil, errors.New("has a user or a password")
	case u.Scheme == "unix" && u.Host == "" && strings.HasPrefix(u.Path, "/") && u.RawQuery == "" && u.Fragment == "":
		socket, request, _ := strings.Cut(u.Path, ":")
		if request == "" {
			request = "/"
		}
		if !strings.HasPrefix(request, "/") {
			return nil, errors.New("has a request that does not begin with /")
		}
		return &URL{cfg: cfg, url: &url.URL{Scheme: "http", Host: "localhost", Path: request}, socket: socket, name: cfg.URL}, nil
	}
	return nil, errors.New("is neither an https URL nor unix:///PATH")
}

// Fetch asks for the bundle, for at most 30 s. Redirects lead from https to https only.
//
// The query of a request to a Unix socket has the parameters that spire-agent sends with
// trust_bundle_unix_socket (SPIRE 1.16, pkg/agent/trustbundlesources), so that the same
// publisher serves both.
func (u *URL) Fetch(ctx context.Context, r Request) (*bundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	target := *u.url
	if u.socket != "" {
		target.RawQuery = u.query(r).Encode()
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), http.NoBody)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", u.name, err)
	}
	transport, err := u.transport()
	if err != nil {
		return nil, err
	}
	client := &http.Client{Transport: transport, CheckRedirect: u.checkRedirect}
	response, err := client.Do(request)
	if err != nil {
		var inner *url.Error // its text has the query
		if errors.As(err, &inner) {
			err = inner.Err
		}
		return nil, fmt.Errorf("ask %s: %w", u.name, err)
	}
	defer response.Body.Close()
	if response.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("ask %s: the answer is %q", u.name, response.Status)
	}
	b, err := read(response.Body, u.cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("the answer of %s %w", u.name, err)
	}
	return b, nil
}

func (u *URL) query(r Request) url.Values {
	mode := "bootstrap"
	if r.Rebootstrap {
		mode = "rebootstrap"
	}
	host, port, err := net.SplitHostPort(u.cfg.ServerAddress)
	if err != nil {
		host = u.cfg.ServerAddress
	}
	return url.Values{
		"spire-attest-mode":         {mode},
		"spire-connection-attempts": {strconv.Itoa(r.Attempt)},
		"spire-attest-start-time":   {r.Since.Format(time.RFC3339)},
		"spire-server-address":      {host},
		"spire-server-port":         {port},
		"spiffe-trust-domain":       {u.cfg.TrustDomain.Name()},
	}
}

// transport returns the transport of one request. No connection outlives it: the next
// request may be months away.
func (u *URL) transport() (*http.Transport, error) {
	if u.socket != "" {
		return &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", u.socket)
		}}, nil
	}
	secure := &tls.Config{MinVersion: tls.VersionTLS12}
	if u.cfg.CAFile != "" {
		roots, err := loadCAs(u.cfg.CAFile)
		if err != nil {
			return nil, err
		}
		secure.RootCAs = roots
	}
	return &http.Transport{DisableKeepAlives: true, Proxy: http.ProxyFromEnvironment, TLSClientConfig: secure, ForceAttemptHTTP2: true}, nil
}

func loadCAs(path string) (*x509.CertPool, error) {
	pems, err := config.ReadFile(path, maxCA)
	if err != nil {
		return nil, fmt.Errorf("read trust_bundle_ca_file: %w", err)
	}
	roots := x509.NewCertPool()
	if !roots.AppendCertsFromPEM(pems) {
		return nil, fmt.Errorf("trust_bundle_ca_file %s holds no PEM certificate", path)
	}
	return roots, nil
}

func withoutQuery(u *url.URL) string {
	plain := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	return plain.String()
}

func (u *URL) checkRedirect(next *http.Request, before []*http.Request) error {
	switch {
	case u.socket != "":
		return errors.New("a publisher on a Unix socket must not redirect")
	case next.URL.Scheme != "https":
		return fmt.Errorf("it redirects to %s, which is not https", withoutQuery(next.URL))
	case len(before) > maxRedirects:
		return fmt.Errorf("it redirects more than %d times", maxRedirects)
	}
	return nil
}
