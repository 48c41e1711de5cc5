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
	cfg Config
	id  atomic.Pointer[Identity]

	signing atomic.Int32 // see Signing
}

// New makes a Node and loads the identity kept from the last run. One of another
// trust domain is left out, which the log says. One that is outside its life is
// not: the clock may be wrong.
//
// An identity file that cannot be read is an error when there is nothing to
// attest with: an operator may be able to repair it. When there is something, a
// join token for instance, the file is renamed and logged, and the node has to
// attest. It is never deleted. A file of a newer version of the agent is always
// an error: that version can still read it.
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
		to, renameErr := cfg.Store.setAside(cfg.Now())
		if renameErr != nil {
			return nil, errors.Join(err, renameErr)
		}
		cfg.Log.Warn("stored agent SVID is corrupt, moved aside, re-attestation required", "error", corrupt.Err, "file", corrupt.Path, "moved_to", to)
	case err != nil:
		return nil, fmt.Errorf("load the agent SVID: %w", err)
	case id == nil:
	case !id.ID().MemberOf(cfg.TrustDomain):
		cfg.Store.leaveIdentity()
		cfg.Log.Warn("stored agent SVID is of another trust domain, attestation required",
			"spiffe_id", id.ID().String(), "trust_domain", cfg.TrustDomain.Name())
	default:
		n.id.Store(id)
		if err := id.ValidAt(cfg.Now()); err != nil {
			cfg.Log.Warn("stored agent SVID is not valid by this node's clock, asking the server", "spiffe_id", id.ID().String(), "error", err)
		}
	}
	return n, nil
}

// Identity is the identity held, nil when there is none. It may have expired.
func (n *Node) Identity() *Identity { return n.id.Load() }

// Signing counts the attestations on their way, whose agent SVID the server has perhaps
// signed already. Read it before Identity, so that it is seen in one of the two.
func (n *Node) Signing() int { return int(n.signing.Load()) }

// Provable returns nil when there is something to prove the node with, and
// otherwise what is missing.
func (n *Node) Provable(ctx context.Context) error {
	_, err := n.cfg.Attestor.Payload(ctx)
	return err
}

// Attest attests the node over conn and takes the identity that the server
// answers with, whatever this node's clock makes of it. trust is what that must
// verify with: the bundle that this same server answered just now, because the
// one the operator gave may be older than the authority that signs.
//
// A join token is used up by the call, so whether the result could be kept is
// checked before. Should it fail to be kept all the same, the identity is used
// from memory, and the Store writes it as soon as it can: the token is gone
// either way.
func (n *Node) Attest(ctx context.Context, conn grpc.ClientConnInterface, trust *bundle.Bundle) error {
	n.signing.Add(1)
	defer n.signing.Add(-1)
	payload, err := n.cfg.Attestor.Payload(ctx)
	if err != nil {
		return err
	}
	if err := n.cfg.Store.writable(); err != nil {
		return fmt.Errorf("the agent SVID could not be written to data_dir, so the node is not attested: %w", err)
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
	now := n.cfg.Now()
	if err == nil {
		err = id.verify(n.cfg.TrustDomain, trust, now)
	}
	if err != nil {
		return fmt.Errorf("the server answered with an agent SVID that cannot be used: %w", err)
	}
	id.received, id.wall = time.Now(), now
	n.insist(id)
	n.cfg.Log.Info("node attested", "spiffe_id", id.ID().String(), "attestor", n.cfg.Attestor.Type(), "expires_at", id.Chain[0].NotAfter)
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
// end is replaced also by one that cannot be kept yet.
func (n *Node) Renew(ctx context.Context, conn grpc.ClientConnInterface) error {
	held := n.id.Load()
	if held == nil {
		return errors.New("there is no agent SVID to renew")
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
	now := n.cfg.Now()
	if err == nil {
		err = id.verify(n.cfg.TrustDomain, n.cfg.Bundle(), now)
	}
	if err == nil && !now.Before(id.Chain[0].NotAfter) && held.ValidAt(now) == nil {
		err = id.ValidAt(now) // a clock that fits the one cannot be wrong about the other
	}
	if err != nil {
		return fmt.Errorf("the server answered with an agent SVID that cannot be used: %w", err)
	}
	id.received, id.wall = time.Now(), now
	if left := held.Life() - held.Age(now); left > held.Life()/4 {
		if err := n.cfg.Store.SaveIdentity(id, false); err != nil {
			return fmt.Errorf("write the agent SVID to data_dir: %w", err)
		}
		n.id.Store(id)
	} else {
		n.insist(id)
	}
	n.cfg.Log.Info("agent SVID renewed", "spiffe_id", id.ID().String(), "expires_at", id.Chain[0].NotAfter)
	return nil
}

// insist uses id whether or not it can be written now. The Store tries until it is.
func (n *Node) insist(id *Identity) {
	if err := n.cfg.Store.SaveIdentity(id, true); err != nil {
		n.cfg.Log.Error("agent SVID not written to data_dir, a restart before it is makes attestation necessary", "error", err)
	}
	n.id.Store(id)
}

// Wipe forgets the identity, in memory and on disk: the server has banned it.
func (n *Node) Wipe() error {
	n.id.Store(nil)
	if err := n.cfg.Store.WipeIdentity(); err != nil {
		return fmt.Errorf("wipe the agent SVID: %w", err)
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
