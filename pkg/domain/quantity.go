package domain

import (
	"math"
	"math/big"
	"regexp"
	"strconv"

	"github.com/quarry-csi/quarry/pkg/fault"
)

var quantityForm = regexp.MustCompile(`^([0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:([kMGTPE]|[KMGTPE]i)|[eE]([+-]?[0-9]{1,3}))?$`)

// ParseQuantity reads a Kubernetes quantity of bytes ("100Gi", "1.5T", "10e9",
// "1048576"); a fraction of a byte is rounded up. The error is fault.Invalid.
func ParseQuantity(s string) (int64, error) {
	m := quantityForm.FindStringSubmatch(s)
	if m == nil {
		return 0, fault.New(fault.Invalid, "%q is not a quantity: a number of bytes, or a number with k, M, G, T, P, E (powers of 1000) or Ki, Mi, Gi, Ti, Pi, Ei (powers of 1024), such as 100Gi", s)
	}
	number, _ := new(big.Rat).SetString(m[1]) // the form was checked
	switch suffix := m[2]; {
	case suffix != "":
		base, power := int64(1000), int64(1)
		if len(suffix) == 2 {
			base = 1024
		}
		for _, c := range "KMGTPE" {
			if byte(c) == suffix[0] || c == 'K' && suffix[0] == 'k' {
				break
			}
			power++
		}
		number.Mul(number, new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(base), big.NewInt(power), nil)))
	case m[3] != "":
		exponent, err := strconv.Atoi(m[3])
		if err != nil {
			return 0, fault.New(fault.Invalid, "quantity %q: %w", s, err)
		}
		scale := new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(max(exponent, -exponent))), nil))
		if exponent < 0 {
			scale.Inv(scale)
		}
		number.Mul(number, scale)
	}
	whole, rest := new(big.Int).QuoRem(number.Num(), number.Denom(), new(big.Int))
	if rest.Sign() > 0 {
		whole.Add(whole, big.NewInt(1))
	}
	if !whole.IsInt64() {
		return 0, fault.New(fault.Invalid, "quantity %q is more than %d bytes", s, int64(math.MaxInt64))
	}
	return whole.Int64(), nil
}
