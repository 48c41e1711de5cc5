package upstream

import (
	"context"
	"fmt"

	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// The most that is taken of an answer. 500 SVIDs with two intermediates and RSA
// keys are 3 MiB.
const (
	maxMintBytes = 16 << 20
	maxChain     = 10
	maxDER       = 64 << 10
	maxToken     = 64 << 10
)

// CSR asks for an X.509-SVID: the entry, and a certificate request that conveys
// the key.
type CSR struct {
	EntryID string
	DER     []byte
}

// Signed is what came of one [CSR]: Chain, leaf first without the root, or Err,
// which is a gRPC status error.
type Signed struct {
	Chain [][]byte
	Err   error
}

// MintX509 has X.509-SVIDs signed. The answers are in the order of the
// requests, as many as those. An error means that the call as a whole failed
// and says nothing about any entry. What an SVID says is not verified here,
// only its size.
func (c *Client) MintX509(ctx context.Context, csrs []CSR) ([]Signed, error) {
	if len(csrs) == 0 {
		return nil, nil
	}
	request := &svidv1.BatchNewX509SVIDRequest{Params: make([]*svidv1.NewX509SVIDParams, len(csrs))}
	for i, r := range csrs {
		request.Params[i] = &svidv1.NewX509SVIDParams{EntryId: r.EntryID, Csr: r.DER}
	}
	var out []Signed
	err := c.call(ctx, fmt.Sprintf("mint %d X.509-SVIDs", len(csrs)), c.cfg.MintTimeout, needIdentity, func(ctx context.Context, l *link) error {
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

// parseSigned takes the answers apart. Answers are told apart by their place
// only, so one too few or too many makes all of them worthless.
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
		return Signed{Err: malformed("a result is OK and has no SVID")}
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

// MintJWT has a JWT-SVID signed for an entry. Only its size is checked here.
func (c *Client) MintJWT(ctx context.Context, entryID string, audience []string) (string, error) {
	var token string
	err := c.call(ctx, "mint JWT-SVID", c.cfg.MintTimeout, needIdentity, func(ctx context.Context, l *link) error {
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
