package kubernetes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/renewd/renewd/internal/config"
)

// client sends GET requests to one server of the cluster. It is safe for concurrent use.
type client struct {
	name  string // for errors: "kubelet"
	hosts string // scheme, host and port
	// plain is true without TLS: nothing below is used then.
	plain bool
	// serverName is the name that the certificate must have; empty: any.
	serverName string
	skipVerify bool
	files      files
	// remedies end an error: one for each cause.
	remedies remedies
	// dial replaces the network in tests.
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu        sync.Mutex
	material  material // of transport
	transport *http.Transport
}

type files struct{ ca, token, certificate, key string }

type remedies struct{ unreachable, ca, serverName, token, forbidden string }

// material is what the files have.
type material struct{ ca, token, certificate, key []byte }

func (m material) sameTLS(o material) bool {
	return bytes.Equal(m.ca, o.ca) && bytes.Equal(m.certificate, o.certificate) && bytes.Equal(m.key, o.key)
}

// maxFile bounds the files that a client reads.
const maxFile = 1 << 20

// read reads the files, which others replace while the agent runs.
func (c *client) read() (m material, err error) {
	read := func(path, what, remedy string) (b []byte) {
		if path == "" || err != nil {
			return nil
		}
		if b, err = config.ReadFile(path, maxFile); err != nil {
			err = fmt.Errorf("read the %s: %w: %s", what, err, remedy)
		}
		return b
	}
	if !c.skipVerify {
		m.ca = read(c.files.ca, c.name+"'s CA file", c.remedies.ca)
	}
	if c.files.certificate != "" {
		m.certificate = read(c.files.certificate, "client certificate", "correct certificate_file")
		m.key = read(c.files.key, "client certificate's private key", "correct private_key_file")
	} else {
		m.token = bytes.TrimSpace(read(c.files.token, "token", "mount the service account's token, or give another file in token_file"))
	}
	return m, err
}

// use returns the transport for the files as they are now, and the token.
func (c *client) use() (*http.Transport, string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.plain {
		if c.transport == nil {
			c.transport = c.newTransport(nil)
		}
		return c.transport, "", nil
	}
	now, err := c.read()
	if err != nil {
		return nil, "", err
	}
	if c.transport == nil || !now.sameTLS(c.material) {
		settings, err := c.tlsConfig(now)
		if err != nil {
			return nil, "", err
		}
		if c.transport != nil {
			c.transport.CloseIdleConnections()
		}
		c.transport, c.material = c.newTransport(settings), now
	}
	return c.transport, string(now.token), nil
}

func (c *client) newTransport(config *tls.Config) *http.Transport {
	return &http.Transport{
		DialContext:     c.dial,
		TLSClientConfig: config,
		// One connection, HTTP/1.1: requests come one by one.
		MaxIdleConns:       1,
		IdleConnTimeout:    30 * time.Second,
		DisableCompression: true, // the server is near
	}
}

func (c *client) tlsConfig(m material) (*tls.Config, error) {
	config := &tls.Config{ServerName: c.serverName, MinVersion: tls.VersionTLS12}
	if c.skipVerify {
		config.InsecureSkipVerify = true // the operator's choice
	} else {
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(m.ca) {
			return nil, fmt.Errorf("%s has no certificate in PEM: %s", c.files.ca, c.remedies.ca)
		}
		config.RootCAs = roots
		if c.serverName == "" {
			// The chain is checked, the name is not: VerifyConnection.
			config.InsecureSkipVerify = true
			config.VerifyConnection = func(s tls.ConnectionState) error {
				intermediates := x509.NewCertPool()
				for _, cert := range s.PeerCertificates[1:] {
					intermediates.AddCert(cert)
				}
				_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates})
				return err
			}
		}
	}
	if m.certificate != nil {
		pair, err := tls.X509KeyPair(m.certificate, m.key)
		if err != nil {
			return nil, fmt.Errorf("client certificate %s: %w", c.files.certificate, err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// get sends a request and has read read the answer, up to limit bytes.
func (c *client) get(ctx context.Context, path, accept string, limit int64, read func(io.Reader) error) error {
	if err := c.try(ctx, path, accept, limit, read); err != nil {
		return fmt.Errorf("%s %s%s: %w", c.name, c.hosts, path, err)
	}
	return nil
}

func (c *client) try(ctx context.Context, path, accept string, limit int64, read func(io.Reader) error) error {
	start := time.Now()
	transport, token, err := c.use()
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, c.hosts+path, nil)
	if err != nil {
		return err
	}
	req.Header.Set("Accept", accept)
	if token != "" {
		req.Header.Set("Authorization", "Bearer "+token)
	}
	// RoundTrip follows no redirect: the token is for this server alone.
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return c.explain(err, ctx.Err(), time.Since(start))
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return c.refused(resp)
	}
	body := &bounded{r: resp.Body, left: limit}
	if err := read(body); err != nil {
		switch {
		case body.left < 0:
			return fmt.Errorf("the answer is longer than %d MB", limit>>20)
		case ctx.Err() != nil:
			return fmt.Errorf("the answer did not end within %s", time.Since(start).Round(time.Second))
		case errors.Is(err, io.EOF):
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("the answer cannot be read: %w", err)
	}
	_, _ = io.Copy(io.Discard, body) // to use the connection again
	return nil
}

// explain adds the remedy to the error of a request that got no answer. ended is the reason if
// its time had ended.
func (c *client) explain(err, ended error, took time.Duration) error {
	remedy := c.remedies.unreachable
	switch {
	case ended != nil:
		return fmt.Errorf("no answer within %s: %s", took.Round(time.Second), remedy)
	case as[x509.HostnameError](err):
		remedy = c.remedies.serverName
	case as[x509.UnknownAuthorityError](err), as[x509.CertificateInvalidError](err):
		remedy = c.remedies.ca
	}
	return fmt.Errorf("%w: %s", err, remedy)
}

func as[E error](err error) bool {
	_, ok := errors.AsType[E](err)
	return ok
}

// maxReason bounds what is quoted of an answer.
const maxReason = 300

func (c *client) refused(resp *http.Response) error {
	body, _ := io.ReadAll(io.LimitReader(resp.Body, maxReason))
	reason := strings.TrimSpace(strings.ToValidUTF8(string(body), "?"))
	remedy := ""
	switch resp.StatusCode {
	case http.StatusUnauthorized:
		remedy = c.remedies.token
	case http.StatusForbidden:
		remedy = c.remedies.forbidden
	}
	return fmt.Errorf("%s, %q: %s", resp.Status, reason, cmp.Or(remedy, c.remedies.unreachable))
}

// close closes the connection. No request may be in flight.
func (c *client) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.transport != nil {
		c.transport.CloseIdleConnections()
	}
}

// bounded reads at most left bytes; left is negative if there are more.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left+1)])
	if b.left -= int64(n); b.left < 0 {
		return 0, io.ErrUnexpectedEOF
	}
	return n, err
}

// newKubelet returns the client of the node's kubelet.
func newKubelet(cfg Config) *client {
	host := cmp.Or(cfg.KubeletHost, cfg.NodeName, "127.0.0.1")
	if cfg.KubeletReadOnlyPort != 0 {
		return &client{
			name: "kubelet", plain: true,
			hosts:    "http://" + net.JoinHostPort(host, strconv.Itoa(cfg.KubeletReadOnlyPort)),
			remedies: remedies{unreachable: "check that the kubelet has readOnlyPort, and that kubelet_host and kubelet_read_only_port name it"},
		}
	}
	return &client{
		name:       "kubelet",
		hosts:      "https://" + net.JoinHostPort(host, strconv.Itoa(cfg.KubeletPort)),
		serverName: cmp.Or(cfg.NodeName, cfg.KubeletHost),
		skipVerify: cfg.SkipKubeletVerification,
		files:      files{ca: cfg.KubeletCAFile, token: cfg.TokenFile, certificate: cfg.CertificateFile, key: cfg.PrivateKeyFile},
		remedies: remedies{
			unreachable: "check that kubelet_host (or node_name) and kubelet_port name this node's kubelet",
			ca: "give the CA of the kubelet's certificate in kubelet_ca_file: the cluster's if the kubelet has serverTLSBootstrap, " +
				"else the node's /var/lib/kubelet/pki/kubelet.crt",
			serverName: "set node_name to a name in the kubelet's certificate",
			token: "give a token of this cluster's API server in token_file, or a client certificate that the kubelet's clientCAFile signs; " +
				"the kubelet needs authentication.webhook for tokens",
			forbidden: "allow get on the resource nodes/pods (Kubernetes 1.33 and newer) or nodes/proxy (older) to the agent's service account in a ClusterRole",
		},
	}
}

// maxList bounds the kubelet's answer. A pod takes 5 to 20 kB.
const maxList = 10 << 20

func (c *client) pods(ctx context.Context) (l *podList, err error) {
	err = c.get(ctx, "/pods", "application/json", maxList, func(r io.Reader) (err error) {
		l, err = readPodList(r)
		return err
	})
	if err != nil {
		return nil, err
	}
	return l, nil
}
