package host

import (
	"fmt"
	"io"
)

// Secret is a text that nothing prints: no format verb, no JSON, no log.
type Secret string

const redacted = "[secret]"

// Format implements fmt.Formatter, for every verb.
func (Secret) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// String implements fmt.Stringer.
func (Secret) String() string { return redacted }

// MarshalText implements encoding.TextMarshaler, and thereby JSON's.
func (Secret) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalLog is what klog prints.
func (Secret) MarshalLog() any { return redacted }
