package node

import (
	"cmp"
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
	"github.com/renewd/renewd/internal/config"
)

// maxChallenges is the most challenges of one attestation that are answered. SPIRE's
// node attestors send none or one.
const maxChallenges = 10

// Config is what a [Node] needs. TrustDomain, Attestor, Store and Bundle are
// required.
type Config struct {
	TrustDomain spiffeid.TrustDomain
	Attestor    Attestor
	// Store stores the identity. The caller closes it.
	Store *Store
	// Bundle returns the trust bundle in force, which verifies renewed SVIDs; nil
	// before there is one. New does not call it.
	Bundle func() *bundle.Bundle
	Log    *slog.Logger
	// Now is the wall clock; nil means time.Now.
	Now func() time.Time
}

// Node is this node's identity at the server. Attest, Renew and Wipe must not run at
// the same time; the other methods are safe for concurrent use.
type Node struct {
	cfg Config
	id  atomic.Pointer[Identity]

	attesting atomic.Int32
}

// New returns a Node with the identity that is stored. It ignores, and logs, an
// identity of another trust domain. It keeps one that is outside its lifetime,
// because the clock may be wrong.
//
// A corrupt identity file is an error when the node has no credential to attest
// with, because an operator may be able to repair it. With a credential, such as a
// join token, New renames the file and logs that, and the node has to attest. A file
// of a newer version of the agent is always an error: that version can still read it.
func New(cfg Config) (*Node, error) {
	if cfg.TrustDomain.IsZero() || cfg.Attestor == nil || cfg.Store == nil || cfg.Bundle == nil {
		return nil, errors.New("node: Config needs TrustDomain, Attestor, Store and Bundle")
	}
	cfg.Log = cmp.Or(cfg.Log, slog.New(slog.DiscardHandler))
	if cfg.Now == nil {
		cfg.Now = time.Now
	}
	n := &Node{cfg: cfg}
	id, err := cfg.Store.LoadIdentity()
	var corrupt *CorruptError
	switch {
	case errors.As(err, &corrupt):
		if _, noCredential := cfg.Attestor.Credential(context.Background()); errors.Is(noCredential, ErrNoCredential) {
			return nil, config.Permanent(err)
		} else if noCredential != nil {
			return nil, err
		}
		to, renameErr := cfg.Store.moveCorruptIdentity(cfg.Now())
		if renameErr != nil {
			return nil, errors.Join(err, renameErr)
		}
		cfg.Log.Warn("stored agent SVID is corrupt, moved aside, re-attestation required", "error", corrupt.Err, "path", corrupt.Path, "moved_to", to)
	case err != nil:
		return nil, fmt.Errorf("load the agent SVID: %w", err)
	case id == nil:
	case !id.ID().MemberOf(cfg.TrustDomain):
		cfg.Store.ignoreIdentity()
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

// Identity returns the identity held, nil when there is none. It may have expired.
func (n *Node) Identity() *Identity { return n.id.Load() }

// Attesting returns the number of attestations in flight, whose agent SVID the server
// may have signed already. Read it before Identity, so that a new SVID is seen in one
// of the two.
func (n *Node) Attesting() int { return int(n.attesting.Load()) }

// CanAttest returns nil when there is a credential to attest the node with, and
// otherwise what is missing.
func (n *Node) CanAttest(ctx context.Context) error {
	_, err := n.cfg.Attestor.Credential(ctx)
	return err
}

// Attest attests the node over conn and uses the identity that the server signs,
// whatever this node's clock shows. trust must verify that identity: it is the bundle
// that this server has just returned, because the operator's may be older than the
// authority that signs.
//
// The call uses up a join token, so Attest first checks that the identity could be
// stored. If storing it fails nevertheless, the Node uses it from memory, and the
// Store retries.
func (n *Node) Attest(ctx context.Context, conn grpc.ClientConnInterface, trust *bundle.Bundle) error {
	n.attesting.Add(1)
	defer n.attesting.Add(-1)
	credential, err := n.cfg.Attestor.Credential(ctx)
	if err != nil {
		return err
	}
	if err := n.cfg.Store.writable(); err != nil {
		return fmt.Errorf("attestation not started, the agent SVID could not be written to data_dir: %w", err)
	}
	key, csr, err := n.newKey()
	if err != nil {
		return err
	}
	result, err := n.attestAgent(ctx, conn, credential, csr)
	if err != nil && credential.About != "" {
		return fmt.Errorf("with %s: %w", credential.About, err)
	}
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
	n.saveAndUse(id)
	n.cfg.Log.Info("node attested", "spiffe_id", id.ID().String(), "attestor", n.cfg.Attestor.Type(), "expires_at", id.Chain[0].NotAfter)
	return nil
}

// attestAgent makes the AttestAgent call: parameters, challenges, result.
func (n *Node) attestAgent(ctx context.Context, conn grpc.ClientConnInterface, credential *Credential, csr []byte) (*agentv1.AttestAgentResponse_Result, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends the stream
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	request := &agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: n.cfg.Attestor.Type(), Payload: credential.Payload},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}
	for range maxChallenges + 1 {
		// Send fails with io.EOF when the server has ended the stream; Recv returns
		// the reason.
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
			if credential.Respond == nil {
				return nil, fmt.Errorf("the server sent a challenge, %s has none", n.cfg.Attestor.Type())
			}
			response, err := credential.Respond(step.Challenge)
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

// Renew replaces the identity over conn, which presents the one held. The server
// revokes the one held at the first use of the new one. So when the answer is invalid
// or cannot be stored, Renew returns an error and the identity held stays in use.
// When that is about to expire, Renew uses the new one even if it cannot be stored.
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
		err = id.ValidAt(now) // the clock is right about the SVID held, so it is about this one
	}
	if err != nil {
		return fmt.Errorf("the server answered with an agent SVID that cannot be used: %w", err)
	}
	id.received, id.wall = time.Now(), now
	if left := held.Lifetime() - held.Age(now); left > held.Lifetime()/4 {
		if err := n.cfg.Store.SaveIdentity(id, false); err != nil {
			return fmt.Errorf("write the agent SVID to data_dir: %w", err)
		}
		n.id.Store(id)
	} else {
		n.saveAndUse(id)
	}
	n.cfg.Log.Info("agent SVID renewed", "spiffe_id", id.ID().String(), "expires_at", id.Chain[0].NotAfter)
	return nil
}

// saveAndUse uses id even if it cannot be written now. The Store retries the write.
func (n *Node) saveAndUse(id *Identity) {
	if err := n.cfg.Store.SaveIdentity(id, true); err != nil {
		n.cfg.Log.Error("agent SVID not written to data_dir, re-attestation required if the agent restarts now", "error", err)
	}
	n.id.Store(id)
}

// Wipe deletes the identity in memory and on disk, after the server has banned it.
func (n *Node) Wipe() error {
	n.id.Store(nil)
	if err := n.cfg.Store.WipeIdentity(); err != nil {
		return fmt.Errorf("wipe the agent SVID: %w", err)
	}
	return nil
}

// newKey returns a key and a certificate signing request for it. The request is empty
// otherwise: the server decides what the SVID contains.
func (n *Node) newKey() (crypto.Signer, []byte, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, fmt.Errorf("generate the node's key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, nil, fmt.Errorf("create the node's certificate request: %w", err)
	}
	return key, csr, nil
}
