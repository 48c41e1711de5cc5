package node

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/renewd/renewd/internal/config"
)

// Attestor is one way to attest the node. It must be safe for concurrent use.
type Attestor interface {
	// Type returns the name of the server's node attestor.
	Type() string
	// Credential returns what one attempt presents. It is called for each attempt, to
	// find a replaced credential, and must not use the credential up. It fails with
	// [ErrNoCredential] when none is configured.
	Credential(ctx context.Context) (*Credential, error)
}

// Credential is what one attempt to attest the node presents.
type Credential struct {
	// Payload is the first message to the server.
	Payload []byte
	// Respond answers one challenge of the server; nil if the attestor has none.
	Respond func(challenge []byte) ([]byte, error)
	// About describes the credential in the error of a server that refuses it. It has
	// nothing secret and may be empty.
	About string
	// ExpiresAt is when the credential ends; zero if that is not known. One that has ended
	// is presented nevertheless: this node's clock may be wrong.
	ExpiresAt time.Time
}

// ErrNoCredential means that the configuration has no credential to attest the node
// with, so that another attempt is useless.
var ErrNoCredential = config.Permanent(errors.New("no credential is configured to attest the node with"))

// maxToken is the longest join token accepted, in bytes. A server's has 36.
const maxToken = 4 << 10

type joinToken struct{ value, file string }

// JoinToken attests a node with a token that the server has issued for it and
// accepts once. The token is value or, when that is empty, the content of file
// without surrounding white space.
func JoinToken(value, file string) Attestor { return joinToken{strings.TrimSpace(value), file} }

func (joinToken) Type() string { return "join_token" }

func (j joinToken) Credential(context.Context) (*Credential, error) {
	if j.value != "" {
		return &Credential{Payload: []byte(j.value)}, nil
	}
	if j.file == "" {
		return nil, fmt.Errorf("%w: set join_token or join_token_file to a token that the server issued for this node, or node_attestation", ErrNoCredential)
	}
	b, err := readFile("join_token_file", j.file, maxToken)
	if err != nil {
		return nil, err
	}
	token := strings.TrimSpace(string(b))
	switch {
	case token == "":
		return nil, fmt.Errorf("join_token_file %s is empty: put a token into it that the server issued for this node; a systemd credential is read when the service starts, so restart it then", j.file)
	case strings.ContainsAny(token, " \t\r\n"):
		return nil, fmt.Errorf("join_token_file %s holds more than one word: it must hold one token and nothing else", j.file)
	}
	return &Credential{Payload: []byte(token)}, nil
}

// readFile reads the file that a field of the configuration names, up to limit bytes.
func readFile(field, path string, limit int64) ([]byte, error) {
	b, err := config.ReadFile(path, limit)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", field, err)
	}
	return b, nil
}
