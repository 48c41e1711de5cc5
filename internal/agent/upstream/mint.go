package upstream

import (
	"context"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Limits of an answer. 500 SVIDs with two intermediates and RSA keys are 3 MiB.
const (
	maxMintBytes = 16 << 20
	maxChain     = 10
	maxDER       = 64 << 10
	maxToken     = 64 << 10
)

// CSR requests an X.509-SVID for an entry. DER is the certificate signing request
// with the public key.
type CSR struct {
	EntryID string
	DER     []byte
}

// Signed is the result of one [CSR]: either Chain, leaf first and without the
// root, or Err, a gRPC status error.
type Signed struct {
	Chain [][]byte
	Err   error
}

// MintX509 requests X.509-SVIDs. It returns one result for each request, in their
// order. An error means that the call failed as a whole. MintX509 checks the size
// of the SVIDs only; the caller verifies them.
func (c *Client) MintX509(ctx context.Context, csrs []CSR) ([]Signed, error) {
	if len(csrs) == 0 {
		return nil, nil
	}
	request := &svidv1.BatchNewX509SVIDRequest{Params: make([]*svidv1.NewX509SVIDParams, len(csrs))}
	for i, r := range csrs {
		request.Params[i] = &svidv1.NewX509SVIDParams{EntryId: r.EntryID, Csr: r.DER}
	}
	var out []Signed
	err := c.call(ctx, fmt.Sprintf("mint %d X.509-SVIDs", len(csrs)), mintTimeout, needIdentity, func(ctx context.Context, l *link) error {
		answer, err := svidv1.NewSVIDClient(l.conn).BatchNewX509SVID(ctx, request, grpc.MaxCallRecvMsgSize(maxMintBytes))
		if err != nil {
			return err
		}
		out, err = parseSigned(answer, len(csrs))
		return err
	})
	if err != nil {
		return nil, err
	}
	return out, nil
}

// parseSigned returns the results of an answer. Results match requests by position
// only, so an answer with too few or too many is rejected as a whole.
func parseSigned(in *svidv1.BatchNewX509SVIDResponse, want int) ([]Signed, error) {
	if len(in.GetResults()) != want {
		return nil, malformed("it has %d results for %d requests", len(in.GetResults()), want)
	}
	out := make([]Signed, want)
	for i, r := range in.GetResults() {
		out[i] = parseResult(r)
	}
	return out, nil
}

func parseResult(r *svidv1.BatchNewX509SVIDResponse_Result) Signed {
	chain := r.GetSvid().GetCertChain()
	switch {
	case r.GetStatus() == nil:
		return Signed{Err: malformed("a result has no status")}
	case codes.Code(r.GetStatus().GetCode()) != codes.OK:
		return Signed{Err: status.Error(codes.Code(r.GetStatus().GetCode()), r.GetStatus().GetMessage())}
	case len(chain) == 0:
		return Signed{Err: malformed("a result with status OK has no SVID")}
	case len(chain) > maxChain:
		return Signed{Err: malformed("an SVID has %d certificates, at most %d are accepted", len(chain), maxChain)}
	}
	for _, der := range chain {
		if len(der) == 0 || len(der) > maxDER {
			return Signed{Err: malformed("an SVID has a certificate of %d bytes, 1 to %d are accepted", len(der), maxDER)}
		}
	}
	return Signed{Chain: chain}
}

// MintJWT requests a JWT-SVID for an entry. It checks the token's size only.
func (c *Client) MintJWT(ctx context.Context, entryID string, audience []string) (string, error) {
	var token string
	err := c.call(ctx, "mint JWT-SVID", mintTimeout, needIdentity, func(ctx context.Context, l *link) error {
		answer, err := svidv1.NewSVIDClient(l.conn).NewJWTSVID(ctx,
			&svidv1.NewJWTSVIDRequest{EntryId: entryID, Audience: audience}, grpc.MaxCallRecvMsgSize(2*maxToken))
		if err != nil {
			return err
		}
		token = answer.GetSvid().GetToken()
		if n := len(token); n == 0 || n > maxToken {
			return malformed("the token has %d bytes, 1 to %d are accepted", n, maxToken)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	return token, nil
}
