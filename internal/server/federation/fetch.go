package federation

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/renewd/renewd/bundle"
)

const (
	// fetchTimeout bounds a fetch, from the connection to the last byte.
	fetchTimeout = 30 * time.Second
	// maxHeader bounds an answer's header, in bytes.
	maxHeader = 64 << 10
	// maxRedirects bounds the redirects of one fetch.
	maxRedirects = 3
)

// newClient returns the client for an endpoint. The library's FetchBundle reads an
// answer of any size and any status, and leaves its connection open.
//
// Each fetch opens a new connection, so that the endpoint is verified with the bundle that
// is current then.
func (f *Follower) newClient(e Endpoint) *http.Client {
	config := &tls.Config{RootCAs: f.cfg.Roots, MinVersion: tls.VersionTLS12}
	if e.Profile == ProfileSPIFFE {
		config = tlsconfig.TLSClientConfig(newest{f}, tlsconfig.AuthorizeID(e.ID))
	}
	transport := &http.Transport{
		DialContext: f.cfg.Dial, TLSClientConfig: config,
		DisableKeepAlives: true, DisableCompression: true, MaxResponseHeaderBytes: maxHeader,
	}
	if f.cfg.Dial == nil {
		transport.Proxy = http.ProxyFromEnvironment
	}
	return &http.Client{
		Transport: transport,
		// A redirect must lead to a valid URL of an endpoint. The new place must
		// authenticate in the same way, and the next fetch starts at the old one (SPIFFE
		// Federation, sections 5.2.1.4, 5.2.2.4 and 7.5.1).
		CheckRedirect: func(req *http.Request, via []*http.Request) error {
			if len(via) > maxRedirects {
				return fmt.Errorf("more than %d redirects", maxRedirects)
			}
			if problem := badURL(req.URL.String()); problem != "" {
				return errors.New("the URL that it redirects to " + problem)
			}
			return nil
		},
		Timeout: fetchTimeout,
	}
}

// newest is the source of the current bundles.
type newest struct{ *Follower }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (f newest) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	certs, err := f.authorities(td)
	if err != nil {
		return nil, err
	}
	return x509bundle.FromX509Authorities(td, certs), nil
}

// errAnswer is the error of an invalid answer.
var errAnswer = errors.New("the answer is not a bundle")

// fetch fetches the bundle of an endpoint. It also returns the authorities that cannot be
// used.
func (p *peer) fetch(ctx context.Context) (*spiffebundle.Bundle, []bundle.LeftOut, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, p.URL, nil)
	if err != nil {
		return nil, nil, err
	}
	resp, err := p.client.Do(req)
	if err != nil {
		if id := spiffeIDOf(err); id != "" && p.Profile == ProfileWeb {
			return nil, nil, fmt.Errorf("%w (its certificate is of %s: is its profile %s?)", err, id, ProfileSPIFFE)
		}
		return nil, nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, nil, fmt.Errorf("the endpoint answered with status %d", resp.StatusCode)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, maxBytes+1))
	switch {
	case err != nil:
		return nil, nil, fmt.Errorf("read the answer: %w", err)
	case len(data) > maxBytes:
		return nil, nil, fmt.Errorf("%w: it is larger than %d bytes", errAnswer, maxBytes)
	}
	b, left, err := parse(p.TrustDomain, data)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errAnswer, err)
	}
	return b, left, nil
}

// spiffeIDOf returns the SPIFFE ID of a certificate that was not verified; empty if it
// has none.
func spiffeIDOf(err error) string {
	failed, ok := errors.AsType[*tls.CertificateVerificationError](err)
	if !ok || len(failed.UnverifiedCertificates) == 0 {
		return ""
	}
	id, err := x509svid.IDFromCert(failed.UnverifiedCertificates[0])
	if err != nil {
		return ""
	}
	return id.String()
}
