package node

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"

	"github.com/renewd/renewd/bundle"
)

// maxChallenges is how many challenges of one attestation are answered. The
// node attestors there are send none or one.
const maxChallenges = 10

// Config is what a [Node] needs. TrustDomain, Attestor, Store and Bundle are
// required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Attestor    Attestor
	// Store keeps the identity. The Node does not close it.
	Store *Store
	// Bundle is the trust bundle in force, which a renewed SVID must verify
	// with; nil before there is one. It is not called by New.
	Bundle func() *bundle.Bundle
	Log    *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Node is this machine as the server knows it. Identity may be called at any
// time; of Attest, Renew and Wipe one at a time.
type Node struct {
	cfg   Config
	id    atomic.Pointer[Identity]
	ended bool
}

// New makes a Node and loads the identity kept from the last run. One that has
// expired or is of another trust domain is left out, which the log says.
//
// An identity file that cannot be read is an error when nothing else could
// prove the node: an operator may be able to repair it. When there is
// something, a join token for instance, the file is renamed and logged, and
// the node proves itself anew. It is never deleted.
func New(cfg Config) (*Node, error) {
	if cfg.TrustDomain.IsZero() || cfg.Attestor == nil || cfg.Store == nil || cfg.Bundle == nil {
		return nil, errors.New("node: Config needs TrustDomain, Attestor, Store and Bundle")
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	n := &Node{cfg: cfg}
	id, err := cfg.Store.LoadIdentity()
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		if _, noProof := cfg.Attestor.Payload(context.Background()); noProof != nil {
			return nil, err
		}
		aside, renameErr := cfg.Store.setAside(cfg.Now())
		if renameErr != nil {
			return nil, errors.Join(err, renameErr)
		}
		cfg.Log.Warn("the own SVID kept from the last run is damaged and was set aside, the node has to be proved anew", "error", corrupt.Err, "file", aside)
	case err != nil:
		return nil, fmt.Errorf("load the own SVID: %w", err)
	case id == nil:
	case !id.ID().MemberOf(cfg.TrustDomain):
		cfg.Log.Warn("the own SVID kept from the last run is of another trust domain, the node has to be proved anew",
			"spiffe_id", id.ID().String(), "trust_domain", cfg.TrustDomain.Name())
	case id.Expired(cfg.Now()):
		cfg.Log.Warn("the own SVID kept from the last run has expired, the node has to be proved anew",
			"spiffe_id", id.ID().String(), "expired_at", id.Chain[0].NotAfter)
		n.ended = true
	default:
		n.id.Store(id)
	}
	return n, nil
}

// Identity is the identity held, nil when there is none. It may have expired.
func (n *Node) Identity() *Identity { return n.id.Load() }

// Ended reports whether New has left out an identity of this trust domain because it
// had expired. The server may still know the node, and has not banned it as far
// as it has said.
func (n *Node) Ended() bool { return n.ended }

// Provable returns nil when there is something to prove the node with, and
// otherwise what is missing.
func (n *Node) Provable(ctx context.Context) error {
	_, err := n.cfg.Attestor.Payload(ctx)
	return err
}

// Attest proves the node over conn and takes the identity that the server
// answers with. trust is what that must verify with: the bundle that this same
// server answered just now, because the one the operator gave may be older
// than the authority that signs.
//
// A join token is used up by the call, so whether the result could be kept is
// checked before. Should it fail to be kept all the same, the identity is used
// from memory and the log says so: the token is gone either way.
func (n *Node) Attest(ctx context.Context, conn grpc.ClientConnInterface, trust *bundle.Bundle) error {
	payload, err := n.cfg.Attestor.Payload(ctx)
	if err != nil {
		return err
	}
	if err := n.cfg.Store.writable(); err != nil {
		return fmt.Errorf("the own SVID could not be kept, so the node is not proved: %w", err)
	}
	key, csr, err := n.newKey()
	if err != nil {
		return err
	}
	result, err := n.converse(ctx, conn, payload, csr)
	if err != nil {
		return err
	}
	id, err := newIdentity(key, result.GetSvid().GetCertChain(), result.GetReattestable())
	if err == nil {
		err = id.verify(n.cfg.TrustDomain, trust, n.cfg.Now())
	}
	if err != nil {
		return fmt.Errorf("the server answered with an own SVID that cannot be used: %w", err)
	}
	if err := n.cfg.Store.SaveIdentity(id); err != nil {
		n.cfg.Log.Error("the own SVID could not be kept: after a restart the node has to be proved anew", "error", err)
	}
	n.id.Store(id)
	n.cfg.Log.Info("node proved", "spiffe_id", id.ID().String(), "attestor", n.cfg.Attestor.Type(), "expires_at", id.Chain[0].NotAfter)
	return nil
}

// converse does the AttestAgent call: parameters, challenges, result.
func (n *Node) converse(ctx context.Context, conn grpc.ClientConnInterface, payload, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream in every case
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	request := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: n.cfg.Attestor.Type(), Payload: payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}
	for range maxChallenges + 1 {
		// Send fails with io.EOF when the server has ended the stream; why, only
		// Recv knows.
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		answer, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return nil, errors.New("the server ended the attestation without a result")
		}
		if err != nil {
			return nil, err
		}
		switch step := answer.GetStep().(type) {
		case *agentv1.AttestAgentResponse_Result_:
			return step.Result, nil
		case *agentv1.AttestAgentResponse_Challenge:
			response, err := n.cfg.Attestor.Respond(ctx, step.Challenge)
			if err != nil {
				return nil, err
			}
			request = &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_ChallengeResponse{ChallengeResponse: response}}
		default:
			return nil, errors.New("the server answered neither with a challenge nor with a result")
		}
	}
	return nil, fmt.Errorf("the server sent more than %d challenges", maxChallenges)
}

// Renew replaces the identity over conn, on which the present one is used. The
// server takes the new one into force, and retires the present one, when it is
// first used. So nothing is lost when the answer is wrong or cannot be kept:
// the error says so and the present identity stays. Only one that is about to
// end is replaced also by one that cannot be kept.
func (n *Node) Renew(ctx context.Context, conn grpc.ClientConnInterface) error {
	held := n.id.Load()
	if held == nil {
		return errors.New("there is no own SVID to renew")
	}
	key, csr, err := n.newKey()
	if err != nil {
		return err
	}
	answer, err := agentv1.NewAgentClient(conn).RenewAgent(ctx, &agentv1.RenewAgentRequest{
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	})
	if err != nil {
		return err
	}
	id, err := newIdentity(key, answer.GetSvid().GetCertChain(), held.Reattestable)
	if err == nil && id.ID() != held.ID() {
		err = fmt.Errorf("it is %q, the node is %q", id.ID(), held.ID())
	}
	if err == nil {
		err = id.verify(n.cfg.TrustDomain, n.cfg.Bundle(), n.cfg.Now())
	}
	if err != nil {
		return fmt.Errorf("the server answered with an own SVID that cannot be used: %w", err)
	}
	if err := n.cfg.Store.SaveIdentity(id); err != nil {
		leaf := held.Chain[0]
		if left := leaf.NotAfter.Sub(n.cfg.Now()); left > leaf.NotAfter.Sub(leaf.NotBefore)/4 {
			return fmt.Errorf("keep the own SVID: %w", err)
		}
		n.cfg.Log.Error("the renewed own SVID could not be kept: after a restart the node has to be proved anew", "error", err)
	}
	n.id.Store(id)
	n.cfg.Log.Info("own SVID renewed", "spiffe_id", id.ID().String(), "expires_at", id.Chain[0].NotAfter)
	return nil
}

// Wipe forgets the identity, in memory and on disk: the server has banned it.
func (n *Node) Wipe() error {
	n.id.Store(nil)
	if err := n.cfg.Store.WipeIdentity(); err != nil {
		return fmt.Errorf("wipe the own SVID: %w", err)
	}
	return nil
}

// newKey makes a key and a certificate request for it. The request conveys the
// key and nothing else: the server chooses everything that the SVID says.
func (n *Node) newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("make the node's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("make the node's certificate request: %w", err)
	}
	return key, csr, nil
}
