package x509pop

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"math/big"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// nonceSize is the size of both nonces in bytes.
const nonceSize = 32

// challenges is a challenge: the verifier's nonce, under the kind of the agent's key. The
// other kind is null.
type challenges struct {
	RSA   *nonce `json:"rsa_signature"`
	ECDSA *nonce `json:"ecdsa_signature"`
}

type nonce struct {
	Nonce []byte `json:"nonce"`
}

// answers is the answer: the agent's nonce and its signature over SHA-256 of the
// verifier's and the agent's nonce.
type answers struct {
	RSA *struct {
		nonce
		Signature []byte `json:"signature"`
	} `json:"rsa_signature"`
	ECDSA *struct {
		nonce
		R []byte `json:"r"`
		S []byte `json:"s"`
	} `json:"ecdsa_signature"`
}

// prove lets the agent prove that it has the key of its certificate.
func prove(leaf *x509.Certificate, challenge func([]byte) ([]byte, error)) error {
	if leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0 {
		return status.Error(codes.Internal, "unable to generate challenge: certificate not intended for digital signature use")
	}
	ours := make([]byte, nonceSize)
	_, _ = rand.Read(ours) // never fails
	var c challenges
	switch key := leaf.PublicKey.(type) {
	case *rsa.PublicKey:
		c.RSA = &nonce{ours}
	case *ecdsa.PublicKey:
		c.ECDSA = &nonce{ours}
	default:
		return status.Errorf(codes.Internal, "unable to generate challenge: unsupported public key type %T: use RSA or ECDSA", key)
	}
	question, err := json.Marshal(c)
	if err != nil {
		return fmt.Errorf("encode challenge: %w", err)
	}
	answer, err := challenge(question)
	if err != nil {
		return err
	}
	var a answers
	if err := json.Unmarshal(answer, &a); err != nil {
		return status.Errorf(codes.InvalidArgument, "unable to unmarshal challenge response: %v", err)
	}
	if err := a.verify(leaf.PublicKey, ours); err != nil {
		return status.Errorf(codes.PermissionDenied, "challenge response verification failed: %v", err)
	}
	return nil
}

func (a *answers) verify(key crypto.PublicKey, ours []byte) error {
	switch key := key.(type) {
	case *rsa.PublicKey:
		if a.RSA == nil {
			return errors.New("expecting RSA response")
		}
		digest, err := combine(ours, a.RSA.Nonce)
		if err != nil {
			return err
		}
		if rsa.VerifyPSS(key, crypto.SHA256, digest, a.RSA.Signature, nil) != nil {
			return errors.New("RSA signature verify failed")
		}
		return nil
	case *ecdsa.PublicKey:
		if a.ECDSA == nil {
			return errors.New("expecting ECDSA response")
		}
		digest, err := combine(ours, a.ECDSA.Nonce)
		if err != nil {
			return err
		}
		if !ecdsa.Verify(key, digest, new(big.Int).SetBytes(a.ECDSA.R), new(big.Int).SetBytes(a.ECDSA.S)) {
			return errors.New("ECDSA signature verify failed")
		}
		return nil
	}
	return fmt.Errorf("unsupported public key type %T", key)
}

// combine returns what the agent signs.
func combine(ours, theirs []byte) ([]byte, error) {
	if len(theirs) != nonceSize {
		return nil, fmt.Errorf("response nonce has %d bytes, not %d", len(theirs), nonceSize)
	}
	h := sha256.New()
	h.Write(ours)
	h.Write(theirs)
	return h.Sum(nil), nil
}
