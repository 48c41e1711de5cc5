package upstream

import (
	"context"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bundlev1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/bundle/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/renewd/renewd/bundle"
)

const (
	// maxBundleBytes is the largest bundle accepted from the server. An authority takes 1
	// to 2 KiB.
	maxBundleBytes = 8 << 20
	// maxExpiry is the end of year 9999, the last that RFC 3339 can express.
	maxExpiry = 253402300799
)

// FetchBundle returns the bundle of the server's trust domain. With
// FetchFederatedBundle it implements [bundle.Fetcher].
//
// A server that no longer has the authority of the agent SVID ends every
// connection that presents it. FetchBundle then fetches the bundle anonymously.
func (c *Client) FetchBundle(ctx context.Context) (*bundle.Bundle, error) {
	var out *bundle.Bundle
	err := c.call(ctx, "fetch bundle", pollTimeout, needNothing, func(ctx context.Context, l *link) (err error) {
		out, err = c.getBundle(ctx, l.conn)
		return err
	})
	if seen := c.serverSeen.Swap(false); seen && status.Code(err) == codes.Unavailable && ctx.Err() == nil {
		out, err = c.fetchAnonymously(ctx)
	}
	if err != nil {
		return nil, err
	}
	c.fetched.Store(out)
	return out, nil
}

func (c *Client) fetchAnonymously(ctx context.Context) (*bundle.Bundle, error) {
	l, err := c.open(nil, c.clientTLS(nil))
	if err != nil {
		return nil, err
	}
	defer l.conn.Close()
	ctx, cancel := context.WithTimeout(ctx, pollTimeout)
	defer cancel()
	out, err := c.getBundle(ctx, l.conn)
	if err != nil {
		return nil, fmt.Errorf("fetch bundle: %w", err)
	}
	return out, nil
}

// FetchFederatedBundle returns the bundle of another trust domain, or
// [bundle.ErrNotFound] when the server has none, or has one without any X.509
// authority.
func (c *Client) FetchFederatedBundle(ctx context.Context, td spiffeid.TrustDomain) (*bundle.Bundle, error) {
	var out *bundle.Bundle
	err := c.call(ctx, fmt.Sprintf("fetch bundle of %q", td.Name()), pollTimeout, needIdentity, func(ctx context.Context, l *link) error {
		answer, err := bundlev1.NewBundleClient(l.conn).GetFederatedBundle(ctx,
			&bundlev1.GetFederatedBundleRequest{TrustDomain: td.Name()}, grpc.MaxCallRecvMsgSize(maxBundleBytes))
		if status.Code(err) == codes.NotFound {
			return bundle.ErrNotFound
		}
		if err != nil {
			return err
		}
		if len(answer.GetX509Authorities()) == 0 && answer.GetTrustDomain() == td.Name() {
			return bundle.ErrNotFound // that trust domain trusts no X.509-SVID
		}
		out, err = parseBundle(td, answer)
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// parseBundle converts a server's bundle. [bundle.New] decides which authorities
// are usable.
func parseBundle(td spiffeid.TrustDomain, in *types.Bundle) (*bundle.Bundle, error) {
	got, err := spiffeid.TrustDomainFromString(in.GetTrustDomain())
	if err != nil {
		return nil, malformed("bundle: %v", err)
	}
	if got != td {
		return nil, malformed("it is the bundle of %q instead of %q", got.Name(), td.Name())
	}
	c := bundle.Content{Sequence: in.GetSequenceNumber(), RefreshHint: bundle.Seconds(in.GetRefreshHint())}
	for _, a := range in.GetX509Authorities() {
		c.AddX509(a.GetAsn1(), a.GetTainted())
	}
	for _, k := range in.GetJwtAuthorities() {
		c.AddJWT(k.GetKeyId(), k.GetPublicKey(), unixTime(k.GetExpiresAt()), k.GetTainted())
	}
	b, err := bundle.New(td, c)
	if err != nil {
		return nil, malformed("%v", err)
	}
	return b, nil
}

// unixTime converts a server's time in seconds. Zero means no time.
func unixTime(s int64) time.Time {
	if s == 0 {
		return time.Time{}
	}
	return time.Unix(min(max(s, 1), maxExpiry), 0).UTC()
}
